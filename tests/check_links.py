#!/usr/bin/env python3
"""Checks that every relative link and anchor of README.md, the guide and the catalogue of faults has a target: on a forge, and
in the pages that `cargo doc` made of the guide. `make doc` runs it after `cargo doc`."""
import html.parser
import os
import re
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
GUIDE = os.path.join(ROOT, "src", "guide")
LINKS = os.path.join(GUIDE, "links.md")
PAGES = os.path.join(os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target")), "doc", "outbox_relay", "guide")

DEFINITION = re.compile(r"^\[([^\]]+)\]: (\S+)$", re.MULTILINE)
INLINE = re.compile(r"\[[^\[\]]*\]\(([^()\s]+)\)")
USED = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\[([^\[\]]+)\]|\[([^\[\]]+)\](?![\[(:])")


def prose(text):
    """The text without its code."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(text):
    """The anchors that a forge gives to the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def read(path):
    with open(path, encoding="utf-8") as file:
        return file.read()


def is_foreign(target):
    return re.match(r"[a-z]+:", target) is not None and not target.startswith("crate::")


def check_target(page, target):
    """Returns what is wrong with a link on a forge."""
    path, _, anchor = target.partition("#")
    file = os.path.normpath(os.path.join(os.path.dirname(page), path)) if path else page
    if not os.path.exists(file):
        return f"there is no {path}"
    if anchor and anchor not in anchors(read(file)):
        return f"{os.path.relpath(file, ROOT)} has no heading for #{anchor}"
    return None


def of_rustdoc(page, target):
    """Returns what `links.md` must define for a link to another chapter; None for a link to another file."""
    path, _, anchor = target.partition("#")
    file = os.path.relpath(os.path.normpath(os.path.join(os.path.dirname(page), path)), GUIDE)
    if not file.endswith(".md") or file.startswith(".."):
        return None
    modules = file.removesuffix(".md").replace("-", "_").replace("/", "::")
    return f"crate::guide::{modules}" + (f"#{anchor}" if anchor else "")


def check_markdown():
    for page in [os.path.join(ROOT, "README.md"), os.path.join(ROOT, "tests", "it", "FAULTS.md"), *chapters()]:
        text = read(page)
        targets = [target for target in INLINE.findall(prose(text)) if not is_foreign(target)]
        targets += [target for _, target in DEFINITION.findall(text)]
        for target in targets:
            if wrong := check_target(page, target):
                yield f"{os.path.relpath(page, ROOT)}: {target}: {wrong}"


def check_labels():
    """Checks that a chapter defines the labels that it uses, and that `links.md` defines them for rustdoc."""
    for_rustdoc = dict(DEFINITION.findall(read(LINKS)))
    everywhere = set()
    for page in chapters():
        text, name = read(page), os.path.relpath(page, ROOT)
        own = dict(DEFINITION.findall(text))
        body = DEFINITION.sub("", text)
        code = re.sub(r"^```.*?^```$", "", body, flags=re.MULTILINE | re.DOTALL)
        used = {first or second for first, second in USED.findall(re.sub(r"`[^`\n]*`", "code", code))}
        yield from (f"{name}: [{label}] is not defined at its end" for label in used - own.keys())
        yield from (f"{name}: [{label}] is defined and not used" for label in own.keys() - used)
        for target in INLINE.findall(prose(text)):
            if not is_foreign(target) and not target.startswith("#"):
                yield f"{name}: ({target}) leads nowhere in rustdoc; give the link a label"
        for label, target in own.items():
            expected = of_rustdoc(page, target)
            if label not in for_rustdoc:
                yield f"src/guide/links.md: [{label}] is missing, which {name} uses"
            elif expected and for_rustdoc[label] != expected:
                yield f"src/guide/links.md: [{label}] is {for_rustdoc[label]}, and in {name} {expected}"
        everywhere |= own.keys()
    yield from (f"src/guide/links.md: [{label}] is in no chapter" for label in for_rustdoc.keys() - everywhere)


def chapters():
    for folder, _, files in sorted(os.walk(GUIDE)):
        yield from (os.path.join(folder, file) for file in sorted(files) if os.path.join(folder, file) != LINKS)


class Page(html.parser.HTMLParser):
    """The ids and the links of a page of rustdoc."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links = set(), []
        self.feed(read(path))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if "id" in attrs:
            self.ids.add(attrs["id"])
        if tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])


def check_rustdoc():
    if not os.path.isdir(PAGES):
        yield f"there is no {os.path.relpath(PAGES, ROOT)}: run `cargo doc --no-deps` first"
        return
    pages = {}

    def page(path):
        if path not in pages:
            pages[path] = Page(path)
        return pages[path]

    paths = [os.path.join(folder, file) for folder, _, files in sorted(os.walk(PAGES)) for file in files if file == "index.html"]
    if len(paths) != sum(1 for _ in chapters()):
        yield f"{len(paths)} chapters in {os.path.relpath(PAGES, ROOT)}, and not those of src/guide"
    for path in paths:
        for link in page(path).links:
            if is_foreign(link):
                continue
            file, _, anchor = link.partition("#")
            target = os.path.normpath(os.path.join(os.path.dirname(path), file)) if file else path
            name = os.path.relpath(path, PAGES)
            if not os.path.exists(target):
                yield f"rustdoc: {name}: {link}: there is no such page"
            elif anchor and target.endswith(".html") and "/src/" not in target and anchor not in page(target).ids:
                yield f"rustdoc: {name}: {link}: the page has no such anchor"


def main():
    wrong = [*check_markdown(), *check_labels(), *check_rustdoc()]
    for line in wrong:
        print(line, file=sys.stderr)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
