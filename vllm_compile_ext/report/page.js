"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const LINE = 22; // pixels from one line of a lane to the next
  const NARROW = 30; // pixels below which a bar has no label
  const FINEST = 1e-5; // seconds that the view shows at least
  const make = (tag, name, text) => {
    const node = document.createElement(tag);
    if (name) node.className = name;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const colour = (phase) => `var(--p-${phase.replace(/[^a-z]+/g, "-")}, var(--p-other))`;
  const time = (s) => {
    const size = Math.abs(s);
    if (size === 0) return "0 s";
    if (size < 0.001) return `${Math.round(s * 1e6)} µs`;
    if (size < 1) return `${Number((s * 1e3).toPrecision(3))} ms`;
    return `${s.toFixed(size < 10 ? 2 : 1)} s`;
  };

  const spans = [];
  for (const process of data.processes) {
    for (const span of process.spans) {
      span.process = process.title;
      const texts = [span.name, span.phase, span.error || "", JSON.stringify(span.attrs), process.title];
      span.text = texts.join("\n").toLowerCase();
      spans.push(span);
    }
  }
  const inOrder = [...spans].sort((a, b) => a.at - b.at || a.line - b.line);
  const about = { line: 0, path: true, process: "what the start waited for", attrs: {} };
  const path = data.path.map(([at, seconds, phase], n) => ({ ...about, id: `path ${n}`, at, seconds, phase, name: phase }));
  const byId = new Map([...spans, ...path].map((span) => [span.id, span]));

  // What is shown at first: until ready, and on to the first token if that came soon.
  const ends = [data.wall, ...data.marks.map((mark) => mark.at)];
  const last = spans.reduce((most, span) => Math.max(most, span.at + span.seconds), Math.max(0.001, ...ends));
  const soon = Math.max(data.wall, ...[last, ...ends].filter((at) => at < data.wall * 1.15));
  const home = { a: 0, b: (soon || last) * 1.012 };
  const limit = Math.max(home.b, last * 1.012);
  const view = { ...home };
  let chosen = null;
  let hits = new Set(spans.map((span) => span.id));
  let phases = new Set();
  let filtered = false;

  const lanes = [];
  const addLane = (title, note, found, kind) => {
    const head = make("h3", "lane-title", title);
    if (note) head.append(make("span", "", note));
    const lane = make("div", `lane ${kind}`);
    lane.style.height = `${LINE * (1 + found.reduce((most, span) => Math.max(most, span.line), 0))}px`;
    $("lanes").append(head, lane);
    lanes.push({ lane, spans: found });
  };
  addLane("What the start waited for", "", path, "path");
  for (const process of data.processes) {
    const found = [...process.spans].sort((a, b) => a.at - b.at);
    if (found.length) addLane(process.title, [process.name, `pid ${process.pid}`].filter(Boolean).join(", "), found, "");
  }

  const ticks = (width) => {
    const rough = ((view.b - view.a) / Math.max(1, width)) * 90;
    const ten = 10 ** Math.floor(Math.log10(rough));
    return [1, 2, 5, 10].map((n) => n * ten).find((step) => step >= rough);
  };

  const bar = (span, x, width) => {
    const node = make("div", "bar");
    node.style.cssText = `left:${x}px;width:${width}px;top:${span.line * LINE}px;--c:${colour(span.phase)}`;
    if (width < NARROW) node.classList.add("slim");
    else node.textContent = (span.error ? "✕ " : "") + span.name;
    if (width < 4) node.classList.add("thin");
    else if (span.waits) node.classList.add("waits");
    else if (span.phase === "other") node.classList.add("plain");
    if (span.error) node.classList.add("bad");
    if (span.open) node.classList.add("open");
    if (filtered && !(span.path ? phases.has(span.phase) : hits.has(span.id))) node.classList.add("dim");
    if (chosen && chosen === span.id) node.classList.add("chosen");
    node.dataset.id = span.id;
    node.title = `${span.name}: ${time(span.seconds)}`;
    return node;
  };

  const draw = () => {
    const width = $("lanes").clientWidth;
    const scale = width / (view.b - view.a);
    for (const { lane, spans: found } of lanes) {
      const nodes = [];
      const drawn = []; // by line: the pixel up to which bars too thin to see apart are drawn
      for (const span of found) {
        const end = span.at + span.seconds;
        if (end < view.a || span.at > view.b) continue;
        let x = Math.max(-2, (span.at - view.a) * scale);
        const right = Math.min(width + 2, (end - view.a) * scale);
        const before = drawn[span.line] ?? -9;
        if (right - x < 4 && Math.abs(x - before) < 1) x = before; // no stripes where gaps cannot be seen
        const size = Math.max(1.5, right - x);
        if (size < 2 && x < before && span.id !== chosen) continue;
        drawn[span.line] = x + size;
        nodes.push(bar(span, x, size));
      }
      lane.replaceChildren(...nodes);
    }
    const step = ticks(width);
    const marks = [];
    for (let n = Math.ceil(view.a / step); n * step <= view.b; n++) {
      const x = (n * step - view.a) * scale;
      if (x > width - 50) break;
      const tick = make("span", "", time(n * step).replace(/\.0+ /, " "));
      tick.style.left = `${x}px`;
      marks.push(tick);
    }
    $("axis").replaceChildren(...marks);
    $("cursor").replaceChildren(
      ...data.marks
        .filter((mark) => mark.at >= view.a && mark.at <= view.b)
        .map((mark) => {
          const x = (mark.at - view.a) * scale;
          const node = make("div", `mark${x > width - 90 ? " flip" : ""}${mark.name === "ready" ? "" : " low"}`);
          node.style.left = `${x}px`;
          node.append(make("b", "", mark.name));
          return node;
        }),
    );
    $("view").dataset.a = view.a;
    $("view").dataset.b = view.b;
  };

  let frame = 0;
  const redraw = () => {
    cancelAnimationFrame(frame);
    frame = requestAnimationFrame(draw);
  };
  const show = (a, b) => {
    const size = Math.min(limit, Math.max(FINEST, b - a));
    view.a = Math.min(Math.max(0, (a + b - size) / 2), limit - size);
    view.b = view.a + size;
    redraw();
  };
  const zoom = (factor, at = (view.a + view.b) / 2) => show(at - (at - view.a) * factor, at + (view.b - at) * factor);
  const move = (share) => {
    const by = Math.max(-view.a, Math.min(limit - view.b, (view.b - view.a) * share));
    show(view.a + by, view.b + by);
  };
  const zoomTo = (span) => show(span.at - span.seconds * 0.1 - FINEST, span.at + span.seconds * 1.1 + FINEST);

  const choose = (id) => {
    const span = byId.get(id);
    chosen = span ? id : null;
    const box = $("detail");
    if (!span) {
      box.replaceChildren(make("span", "muted", "Choose a span to see what it was."));
    } else {
      const took = time(span.seconds) + (span.open ? ", never ended" : "");
      const phase = span.path ? [] : [span.phase]; // it is the name
      const lines = [make("strong", "", span.name), [took, ...phase, span.process, `from ${time(span.at)}`].join(" · ")];
      if (span.waits) lines.push(" · waits for another process");
      if (span.error) lines.push(make("div", "bad", span.error));
      const attrs = Object.entries(span.attrs);
      const say = (v) => (typeof v === "object" ? JSON.stringify(v) : String(v));
      if (attrs.length) lines.push(make("div", "muted", attrs.map(([k, v]) => `${k}: ${say(v)}`).join(" · ")));
      box.replaceChildren(...lines);
    }
    redraw();
  };
  const step = (by) => {
    const found = inOrder.filter((span) => hits.has(span.id));
    if (!found.length) return;
    const at = found.findIndex((span) => span.id === chosen);
    const next = found[at < 0 ? (by > 0 ? 0 : found.length - 1) : Math.min(found.length - 1, Math.max(0, at + by))];
    const size = view.b - view.a;
    if (next.at + next.seconds < view.a || next.at > view.b) show(next.at - size * 0.1, next.at + size * 0.9);
    choose(next.id);
  };

  const list = $("spans");
  const fill = () => {
    const found = spans.filter((span) => hits.has(span.id)).sort((a, b) => b.seconds - a.seconds);
    const rows = found.slice(0, 100).map((span) => {
      const row = make("tr");
      const name = make("td", "", (span.error ? "✕ " : "") + span.name);
      const swatch = make("i", "swatch");
      swatch.style.setProperty("--c", colour(span.phase));
      name.prepend(swatch);
      row.append(name, make("td", "wide", span.phase), make("td", "", span.process));
      row.append(make("td", "num wide", time(span.at)), make("td", "num", time(span.seconds)));
      return row;
    });
    list.tBodies[0].replaceChildren(...rows);
    $("spans-count").textContent = found.length > 100 ? `The 100 longest of ${found.length}.` : `${found.length} spans.`;
  };
  const filter = () => {
    const text = $("filter").value.trim().toLowerCase();
    const words = text.split(/\s+/);
    const fits = text.startsWith("phase:")
      ? (span) => span.phase === text.slice(6).trim()
      : (span) => words.every((word) => span.text.includes(word));
    filtered = text !== "";
    const fitting = spans.filter((span) => !filtered || fits(span));
    hits = new Set(fitting.map((span) => span.id));
    phases = new Set(fitting.map((span) => span.phase));
    $("hits").textContent = filtered ? `${hits.size} of ${spans.length} spans` : "";
    fill();
    redraw();
  };

  $("filter").addEventListener("input", filter);
  for (const button of document.querySelectorAll("button[data-phase]")) {
    button.addEventListener("click", () => {
      const text = `phase:${button.dataset.phase}`;
      $("filter").value = $("filter").value === text ? "" : text;
      filter();
      $("h-timeline").scrollIntoView({ block: "start" });
    });
  }
  const all = () => show(home.a, home.b);
  const buttons = { in: () => zoom(0.5), out: () => zoom(2), left: () => move(-0.3), right: () => move(0.3), reset: all };
  for (const [id, act] of Object.entries(buttons)) $(id).addEventListener("click", act);

  const box = $("view");
  const at = (event) => {
    const { left, width } = $("lanes").getBoundingClientRect();
    return view.a + ((event.clientX - left) / width) * (view.b - view.a);
  };
  const keys = {
    ArrowLeft: () => move(-0.15),
    ArrowRight: () => move(0.15),
    ArrowUp: () => step(-1),
    ArrowDown: () => step(1),
    "+": () => zoom(0.5),
    "=": () => zoom(0.5),
    "-": () => zoom(2),
    0: all,
    Home: all,
    Enter: () => chosen && zoomTo(byId.get(chosen)),
    Escape: () => (chosen ? choose(null) : box.blur()),
  };
  box.addEventListener("keydown", (event) => {
    const act = keys[event.key];
    if (!act || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    act();
  });
  box.addEventListener(
    "wheel",
    (event) => {
      const sideways = Math.abs(event.deltaX) > Math.abs(event.deltaY);
      if (!sideways && !event.ctrlKey && !event.metaKey && document.activeElement !== box) return; // the page scrolls
      event.preventDefault();
      const unit = event.deltaMode === 1 ? 30 : 1;
      if (sideways) move((event.deltaX * unit) / box.clientWidth);
      else zoom(1.002 ** Math.max(-300, Math.min(300, event.deltaY * unit)), at(event));
    },
    { passive: false },
  );
  let drag = null;
  box.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    const bar = event.target.closest(".bar");
    drag = { x: event.clientX, a: view.a, b: view.b, far: false, id: bar ? bar.dataset.id : null };
  });
  addEventListener("pointermove", (event) => {
    if (!drag) return;
    const by = event.clientX - drag.x;
    if (!drag.far && Math.abs(by) < 4) return;
    drag.far = true;
    box.classList.add("dragged");
    const size = drag.b - drag.a;
    const a = Math.max(0, Math.min(limit - size, drag.a - (by / box.clientWidth) * size));
    show(a, a + size);
  });
  const drop = (event) => {
    if (drag && !drag.far && event.type === "pointerup") choose(drag.id);
    drag = null;
    box.classList.remove("dragged");
  };
  addEventListener("pointerup", drop);
  addEventListener("pointercancel", drop);
  box.addEventListener("dblclick", (event) => {
    const bar = event.target.closest(".bar");
    const span = bar && byId.get(bar.dataset.id);
    if (span) zoomTo(span);
    else zoom(0.5, at(event));
  });

  $("timeline").hidden = false;
  choose(null);
  fill();
  draw();
  new ResizeObserver(redraw).observe(box);
})();
