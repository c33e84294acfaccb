"""What pyproject.toml cannot say: vllm_compile_ext.pth goes beside the package, where Python runs it when it starts."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PTH = "vllm_compile_ext.pth"


class BuildWithPth(build_py):
    """Copies the file into the folder that becomes the wheel; of an editable install that is the one of install_lib."""

    def run(self) -> None:
        super().run()
        install = self.get_finalized_command("install_lib")
        folder = install.install_dir if self.editable_mode else self.build_lib
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.copy_file(PTH, str(Path(folder) / PTH))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), str(Path(self.build_lib) / PTH)]


setup(cmdclass={"build_py": BuildWithPth})
