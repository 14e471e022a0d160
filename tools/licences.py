"""docs/licences.md: the Python packages of the images and the licences that they state.

    python -m tools.licences          write docs/licences.md (a test holds it to the locks and the installed packages)

Which packages: what uv.lock gives to the image, without the groups for tests. Which licence: the metadata of the package as it is installed
in the part's environment. Debian's packages bring theirs in /usr/share/doc of the images.
"""

from __future__ import annotations

import sys
import tomllib
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

from tools import sbom
from tools.errors import OperatorError
from tools.layout import REPOSITORY, Layout

PAGE = REPOSITORY / "docs" / "licences.md"
IMAGES = ("trainer", "chatbot")
UNSTATED = {"torchao": "BSD-3-Clause (its LICENSE file)", "cuda-toolkit": "NVIDIA (names other packages, holds no files)"}
"""Packages whose metadata say nothing, with what their files say."""
HEAD = """# Licences

What the images' Python packages say of themselves: made by `python -m tools.licences` from `uv.lock` and the packages' metadata. Debian's
packages have theirs in `/usr/share/doc/*/copyright` of the images; the bill of materials in a bundle ([air-gap.md](air-gap.md)) lists both
by image, with versions. NVIDIA's packages may be used and, inside an image, passed on under NVIDIA's own terms: read them before you
publish an image. Base models have licences of their own (`run.model.licence`), which the model card of a run repeats.
"""


def locked(part: str) -> dict[str, set[str]]:
    """Name and versions of what the part's lock gives to its image; of several, the Python that installs takes one."""
    packages: dict[str, list[dict[str, Any]]] = {}
    for package in tomllib.loads((REPOSITORY / part / "uv.lock").read_text(encoding="utf-8"))["package"]:
        packages.setdefault(sbom.normal(package["name"]), []).append(package)
    (project,) = packages[part]
    groups = {"": project.get("dependencies", []), **project.get("dev-dependencies", {})}
    waiting = [(need["name"], tuple(need.get("extra", []))) for group, needs in groups.items() if group != "test" for need in needs]
    done = set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in done:
            continue
        done.add((name, extras))
        for package in packages[sbom.normal(name)]:
            of_extras = [need for extra in extras for need in package.get("optional-dependencies", {}).get(extra, [])]
            waiting += [(need["name"], tuple(need.get("extra", []))) for need in [*package.get("dependencies", []), *of_extras]]
    return {name: {p["version"] for p in packages[sbom.normal(name)]} for name, _ in done}


def installed(part: str, layout: Layout) -> dict[str, Message]:
    """Metadata of the packages in the part's environment, by name."""
    found = {}
    for path in (layout.cache / "venv" / part).glob("lib/python*/site-packages/*.dist-info/METADATA"):
        head = HeaderParser().parsestr(path.read_text(encoding="utf-8", errors="replace"))
        found[sbom.normal(head["Name"])] = head
    if not found:
        raise OperatorError(f"The environment of {part} is not there. `make test-fast` makes it.")
    return found


def stated(name: str, head: Message) -> str:
    """The licence in words; empty if nobody says."""
    found = [entry.get("expression") or entry["license"]["name"] for entry in sbom.licences(head)]
    return ", ".join(found) or UNSTATED.get(name, "")


def table(layout: Layout) -> dict[str, str]:
    """Licence of each package. Packages that this platform does not install (markers) are left out."""
    found = {}
    for part in IMAGES:
        names = locked(part)
        found.update({name: stated(name, head) for name, head in installed(part, layout).items() if name in names})
    return found


def page(layout: Layout) -> str:
    """The whole page."""
    found: dict[str, list[str]] = {}
    for name, licence in sorted(table(layout).items()):
        found.setdefault(licence, []).append(name)
    rows = [f"| {licence} | {', '.join(names)} |" for licence, names in sorted(found.items(), key=lambda row: row[0].lower())]
    return "\n".join([HEAD, "| licence | packages |", "|---|---|", *rows, ""])


def main(path: Path = PAGE) -> int:
    path.write_text(page(Layout()), encoding="utf-8")
    print(f"wrote {path.relative_to(REPOSITORY)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
