"""Third-party distributions of one plugin each, in a folder that Python finds them in."""

import importlib
import shutil
import sys

from molora_fed import plugins as loader
from molora_fed.storage import distributions

ROUTER = """
from molora_fed import hookimpl


@hookimpl
def register_routers(register):
    register("{name}", "{module}.work:Mine", summary="Follows {name}", source="own definition")
"""

WORK = '''
from molora_fed import OutputRouter, RouterOptions

SHARPNESS = 1.0


class MineOptions(RouterOptions):
    """Options of a router.

    Attributes:
        sharpness: How sharply to follow
            the evidence.
    """

    sharpness: float = SHARPNESS


class Mine(OutputRouter[MineOptions]):
    readings = frozenset({"evidence"})

    def scores(self, view):
        return self.options.sharpness * view.evidence
'''


class Packages:
    """Distributions in a folder that is on the path while a test runs."""

    def __init__(self, root, monkeypatch):
        root.mkdir(parents=True, exist_ok=True)
        self.root = root
        self._modules = set()
        monkeypatch.syspath_prepend(str(root))
        self.refresh()

    def add(self, name, hooks=None, *, work=WORK, version="0.1.0", metadata=""):
        """A distribution whose plugin registers the router `name`, or what `hooks` does."""
        module = name.replace("-", "_")
        package = self.root / module
        package.mkdir(exist_ok=True)
        text = ROUTER.format(name=name, module=module) if hooks is None else hooks
        (package / "__init__.py").write_text(text)
        (package / "work.py").write_text(work)
        self._modules.add(module)
        self._describe(name, version, metadata)
        self.refresh()

    def _describe(self, name, version, metadata=""):
        module = name.replace("-", "_")
        folder = self.root / f"{module}-{version}.dist-info"
        folder.mkdir()
        lines = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{metadata}"
        (folder / "METADATA").write_text(lines)
        (folder / "entry_points.txt").write_text(f"[molora_fed]\n{name} = {module}\n")
        listed = [f"{module}/__init__.py", f"{module}/work.py", f"{folder.name}/METADATA"]
        record = "".join(f"{each},,\n" for each in [*listed, f"../bin/{name}"])
        (folder / "RECORD").write_text(record)

    def upgrade(self, name, version):
        """The same files under another version."""
        self._forget(name)
        self._describe(name, version)
        self.refresh()

    def change(self, name, work):
        """Other code under the same version."""
        (self.root / name.replace("-", "_") / "work.py").write_text(work)
        self.refresh()

    def remove(self, name):
        shutil.rmtree(self.root / name.replace("-", "_"))
        self._forget(name)
        self.refresh()

    def _forget(self, name):
        for folder in self.root.glob(f"{name.replace('-', '_')}-*.dist-info"):
            shutil.rmtree(folder)

    def refresh(self):
        """What a new process would find."""
        for module in self._modules:
            for loaded in [each for each in sys.modules if each.split(".")[0] == module]:
                del sys.modules[loaded]
        importlib.invalidate_caches()
        loader.get_plugins.cache_clear()
        distributions._hash_distribution.cache_clear()

    def close(self):
        shutil.rmtree(self.root)
        self.refresh()
