"""The documentation as a site, made without a network: the pages of this folder and the API from
docstrings. Whatever the tool warns of ends the build, and so does a link to nothing.

    make docs            or, with the extra `docs`: python -m scripts.docs.build [FOLDER]
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import shutil
import sys
import warnings
from os.path import relpath
from pathlib import Path
from typing import Any

from pdoc import doc, render
from pdoc.render_helpers import to_html

import mtp
from scripts.docs.pages import HOME, LINK, ROOT, crawl, place, title

API = Path("api")
# The constructor that Python writes for one lies in no module whose names it could mean.
NAMED_TUPLE = r"Error parsing type annotation .*\.__init__\."
Modules = dict[str, doc.Module]


def build(out: Path) -> None:
    """Write the site, in place of one that is there."""
    modules = find_modules()
    shutil.rmtree(out, ignore_errors=True)
    render.configure(template_directory=HOME / "templates", show_source=False)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", NAMED_TUPLE)
        write_pages(out, modules)
        write_api(out / API, modules)
    if warned:
        raise ValueError("; ".join(str(warning.message) for warning in warned))


def find_modules() -> Modules:
    """Every public one; imported first, as what other packages warn of then is not ours."""
    names = [m.name for m in pkgutil.walk_packages(mtp.__path__, "mtp.") if "._" not in m.name]
    for name in names:
        importlib.import_module(name)
    return {name: doc.Module.from_name(name) for name in ["mtp", *names]}


def write_pages(out: Path, modules: Modules) -> None:
    pages, files = crawl()
    titles = {place(source): title(text) for source, text in pages.items()}
    texts = {place(source): at_home(text, source) for source, text in pages.items()}
    texts[API / "index.html"] = contents(modules)
    titles[API / "index.html"] = "API reference"
    template = render.env.get_template("page.html.jinja2")
    for path, text in texts.items():
        here = path.parent
        html = with_api_links(to_html(text), here, modules)
        menu = [(relpath(other, here), name, other == path) for other, name in titles.items()]
        write(out / path, template.render(title=titles[path], content=html, menu=menu))
    for file in files:
        (out / place(file)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, out / place(file))


def at_home(text: str, source: Path) -> str:
    """The page with links as the site has them."""
    here = place(source).parent

    def moved(link: re.Match[str]) -> str:
        return relpath(place((source.parent / link[1]).resolve()), here)

    return LINK.sub(moved, text)


def contents(modules: Modules) -> str:
    lines = []
    for name, module in modules.items():
        says = " ".join(module.docstring.partition("\n\n")[0].split())
        lines.append(f"- [{name}]({name.replace('.', '/')}.html)" + f": {says}" * bool(says))
    return "# API reference\n\n" + "\n".join(lines)


def with_api_links(html: str, here: Path, modules: Modules) -> str:
    """`mtp.loss.mtp_loss` leads to what its docstring says. ValueError names what there is not."""

    def linked(code: re.Match[str]) -> str:
        name = code[1]
        parts = name.split(".")
        known = (".".join(parts[:i]) for i in range(len(parts), 0, -1))
        module = next(m for m in known if m in modules)
        inner = name[len(module) + 1 :]
        if inner and modules[module].get(inner) is None:
            raise ValueError(f"{name}: {module} has no {inner}")
        there = relpath(API / f"{module.replace('.', '/')}.html", here) + f"#{inner}" * bool(inner)
        return f'<a href="{there}">{code[0]}</a>'

    return re.sub(r"<code>(mtp(?:\.\w+)+)(?:\([^<]*\))?</code>", linked, html)


def write_api(out: Path, modules: Modules) -> None:
    for name, module in modules.items():
        file = out / f"{name.replace('.', '/')}.html"
        write(file, render.html_module(module, modules))
    write(out / "search.js", render.search_index(modules))


def write(file: Path, text: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build" / "docs")
    try:
        build(folder)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(folder / "index.html")
