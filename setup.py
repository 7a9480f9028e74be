"""The parts of the package that pyproject.toml cannot say: where kernels/ and the table of
primitives go, and that csrc/build.py builds the extension. Everything else is in pyproject.toml."""

import importlib.util
import shutil
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
TABLE = Path("csrc") / "primitives.def"


def _native():
    """csrc/build.py; it belongs to no package."""
    spec = importlib.util.spec_from_file_location("fastffn_native", ROOT / "csrc" / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


class NinjaBuild(build_ext):
    """Builds `fastffn._C` and its record; a failure leaves the record alone."""

    def run(self):
        native = _native()
        package = Path("fastffn") if self.inplace else Path(self.build_lib) / "fastffn"
        try:
            record = native.build(ROOT / package)
        except native.BuildError as error:
            raise SystemExit(f"error: {error}") from error
        if record["status"] == "failed":
            print(f"warning: csrc was not built, slower paths serve: {record['error']}")

    def get_output_mapping(self):
        return {}  # in place, the files are written where they stay

    def get_outputs(self):
        native = _native()
        package = Path("fastffn") if self.inplace else Path(self.build_lib) / "fastffn"
        paths = [package / native.MODULE, package / native.RECORD]
        return [str(path) for path in paths if (ROOT / path).is_file()]

    def get_source_files(self):
        return []  # MANIFEST.in names them


class BuildPython(build_py):
    """Adds the table of primitives beside the package and forgets files that earlier builds left.

    An editable install reads the table in csrc/ itself.
    """

    def run(self):
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "fastffn", ignore_errors=True)
        super().run()
        if not self.editable_mode and TABLE.is_file():
            target = Path(self.build_lib) / "fastffn" / TABLE
            self.mkpath(str(target.parent))
            self.copy_file(str(TABLE), str(target))


setup(
    packages=[
        *find_packages(include=["fastffn", "fastffn.*"]),
        "fastffn.kernels",
        *(f"fastffn.kernels.{name}" for name in find_packages("kernels")),
    ],
    # A public package is called kernels: the folder of that name is ours only below fastffn.
    package_dir={"fastffn": "fastffn", "fastffn.kernels": "kernels"},
    # Recipes and found genes. Without include_package_data=False setuptools takes the folders of
    # recipes for packages, and warns.
    package_data={
        "fastffn.distill": ["recipes/*.yaml"],
        "fastffn.expr.found": ["*.json"],
        "fastffn.search": ["recipes/*.yaml"],
    },
    include_package_data=False,
    ext_modules=[Extension("fastffn._C", sources=[], optional=True)],
    cmdclass={"build_ext": NinjaBuild, "build_py": BuildPython},
)
