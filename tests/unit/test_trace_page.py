"""The page of `kvmpriv trace --page` as a browser shows it, and its colours as people see them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from html import escape, unescape
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from kvmpriv import trace
from private.support.requirements import missing

WIDTHS = (360, 800, 1280)
FONT_MIN = 11  # pixels
MIB = 1 << 20

#: In a page with a frame of each width: lists what is wrong with the text in each frame.
MEASURE = """
const found = [];
for (const frame of document.querySelectorAll("iframe")) {
  const page = frame.contentDocument, window = frame.contentWindow, width = frame.clientWidth;
  const wrong = (what, text) => found.push([frame.name, width, what, text.trim().slice(0, 60)]);
  for (const each of page.querySelectorAll("details")) each.open = true;
  if (page.documentElement.scrollWidth > width) wrong("page scrolls sideways", "");
  const texts = [];
  const walker = page.createTreeWalker(page, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode()); ) {
    const parent = node.parentElement;
    if (!node.data.trim() || parent.closest("style, script, title")) continue;
    const range = page.createRange();
    range.selectNodeContents(node);
    const boxes = [...range.getClientRects()].filter(box => box.width && box.height);
    if (!boxes.length) { wrong("not shown", node.data); continue; }
    const scale = parent.getScreenCTM ? parent.getScreenCTM().a : 1;
    const size = scale * parseFloat(window.getComputedStyle(parent).fontSize);
    if (size < FONT_MIN) wrong(`text of ${size.toFixed(1)} px`, node.data);
    for (let box of boxes) {
      for (let outer = parent; outer !== page.documentElement; outer = outer.parentElement) {
        const style = window.getComputedStyle(outer), edge = outer.getBoundingClientRect();
        const clips = style.overflowX !== "visible" || style.overflowY !== "visible";
        if (style.textOverflow === "ellipsis" && clips) {
          if (box.right > edge.right + 1) wrong("shortened", node.data);
          box = DOMRect.fromRect({...box.toJSON(), width: Math.min(box.right, edge.right) - box.x});
        }
        const sized = outer === parent && style.display !== "inline";
        if ((clips || sized) && (box.left < edge.left - 1 || box.right > edge.right + 1))
          wrong("wider than its box", node.data);
        if (clips && (box.top < edge.top - 1 || box.bottom > edge.bottom + 1))
          wrong("higher than its box", node.data);
        const scrolls = outer.scrollWidth > outer.clientWidth + 1 && outer.clientWidth;
        if (clips && scrolls && style.textOverflow !== "ellipsis")
          wrong("scrolls sideways", node.data);
      }
      if (box.left < 0 || box.right > width) wrong("beyond the page", node.data);
      texts.push({box, node});
    }
  }
  texts.forEach(({box, node}, at) => {
    for (const other of texts.slice(at + 1)) {
      const across = Math.min(box.right, other.box.right) - Math.max(box.left, other.box.left);
      const down = Math.min(box.bottom, other.box.bottom) - Math.max(box.top, other.box.top);
      if (across > 1 && down > 3 && node !== other.node)
        wrong("over another text", `${node.data.trim().slice(0, 28)} / ${other.node.data.trim()}`);
    }
  });
  if (!texts.length) wrong("no text", "");
}
document.body.innerHTML = "<pre id=found></pre>";
document.getElementById("found").textContent = JSON.stringify(found);
"""


def browser() -> str:
    names = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
    found = filter(None, map(shutil.which, names))
    return next(found, None) or missing("browser", "there is no Chromium: make browser")


def complaints(pages: Mapping[str, str], folder: Path) -> dict[str, list[list[Any]]]:
    """What is wrong with the text of each page: width, what, and the text."""
    frames = "".join(
        f'<iframe name="{name}" width="{width}" height="600" srcdoc="{escape(page)}"></iframe>'
        for name, page in pages.items()
        for width in WIDTHS
    )
    script = MEASURE.replace("FONT_MIN", str(FONT_MIN))
    harness = folder / "harness.html"
    harness.write_text(
        f"<!doctype html><meta charset=utf-8><style>iframe {{ border: 0 }}</style><body>{frames}"
        f"<script>onload = () => {{ {script} }}</script>"
    )
    command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={folder / 'profile'}", "--window-size=1400,900"]
    done = subprocess.run([*command, harness.as_uri()], capture_output=True, text=True, timeout=100)
    answer = re.search(r'<pre id="found">(.*)</pre>', done.stdout, re.DOTALL)
    assert answer, f"{done.stdout[-300:]}\n{done.stderr[-2000:]}"
    found: dict[str, list[list[Any]]] = {name: [] for name in pages}
    for name, *each in json.loads(unescape(answer[1])):
        found[name].append(each)
    return found


def recording(
    events: list[Any], *, ranges: int = 2, what: str = "Linux 6.1.192-restrictedmem", **about: Any
) -> trace.Recording:
    """A recording of a guest with a shared range and more ranges that are private."""
    parts = [
        {
            "gpa": n << 32,
            "size": (128 + 256 * bool(n)) * MIB,
            "kind": "private" if n else "shared",
            "purpose": f"applications {n}" if n else "kernel, rings and bounce buffers",
        }
        for n in range(ranges)
    ]
    first: Any = {"kvmpriv_trace": 1, "what": what, "cpus": 4, "ranges": parts, **about}
    return trace.Recording(first, events, cut_off=False)


def sample(at: float, ranges: int = 2, size: int = 256 * MIB) -> dict[str, Any]:
    memory = [{"resident": 88 * MIB + 700_000, "private": 0}]  # wide: 88.7 MiB
    memory += [{"resident": 12288, "private": size // n} for n in range(1, ranges)]
    return {"t": at, "memory": memory, "rss": 50 * MIB, "shared": 7 * MIB, "cpu": [at], "others": 1}


def port(at: float, number: int) -> dict[str, Any]:
    return {"t": at, "cpu": 0, "exit": "KVM_EXIT_IO", "port": number, "write": True}


DEVICES = [
    {"name": "console (COM1)", "port": 0x3F8, "size": 8},
    {"name": "virtio-blk", "gpa": 0xD0000000, "size": 0x200},
]
END = {"t": 20.0, "end": "off", "status": 0, "why": "turned itself off"}
ORDINARY = [
    *(sample(n / 4, size=n * 3 * MIB) for n in range(80)),
    *(port(2 + n / 50, 0x3F8 + n % 6) for n in range(300)),
    *(port(1 + n / 50, 0xCF8) for n in range(40)),
    {"t": 3.0, "cpu": 0, "exit": "KVM_EXIT_MMIO", "gpa": 0xD0000040, "write": False},
    {"t": 3.5, "mark": "init runs"},
    *(
        {
            "t": 4 + n / 9,
            "cpu": 0,
            "convert": kind,
            "gpa": (4 << 30) + n * MIB,
            "size": MIB,
            "by": "x",
        }
        for n, kind in enumerate(["private", "shared"] * 40)
    ),
    {"t": 9.9, "mark": "ready"},
    END,
]
LONG = "W" * 400
PURPOSES = [
    {"gpa": n << 32, "size": 1 << 50, "kind": kind, "purpose": f"{LONG} {n}"}
    for n, kind in enumerate(["shared", "private", "kind " + LONG])
]
PAGES = {
    "ordinary": recording(ORDINARY, devices=DEVICES, date="2026-11-27T10:04:11Z", cmdline="quiet"),
    "many ranges": recording([sample(0.0, 40), sample(5.0, 40), END], ranges=40),
    "many devices": recording(
        [*(port(n / 10, 0x1000 + n % 20) for n in range(600)), port(1.0, 7), END],
        devices=[{"name": f"device {n}", "port": 0x1000 + n, "size": 1} for n in range(20)],
    ),
    "long texts": recording(
        [
            {**sample(0.0), "memory": [{"resident": 1 << 49, "private": 1 << 49}] * 3},
            {**sample(9e11), "memory": [{"resident": 1 << 49, "private": 1 << 48}] * 3},
            {"t": 1.0, "cpu": 0, "exit": "KVM_EXIT_" + LONG},
            port(9e11, 0x3F8),
            {"t": 1e3, "cpu": 0, "exit": LONG, "gpa": 1 << 63},
            *({"t": 1e11 * n, "mark": LONG} for n in range(9)),
            {"t": 9e11, "cpu": 0, "convert": "shared", "gpa": 0, "size": 1 << 50, "by": LONG},
            {"t": 9e11, "end": LONG, "status": -(1 << 31), "why": f"{LONG}\n{LONG}"},
        ],
        what=LONG,
        ranges=0,
        cmdline=LONG,
        private_abi=LONG,
        date=LONG,
        devices=[{"name": LONG, "port": 0x3F8, "size": 8}],
    ),
    "a moment": recording([sample(0.0), {**END, "t": 0.0}]),
    "microseconds": recording([sample(0.0), sample(2e-6), port(2e-6, 0x80)]),
    "nothing": recording([]),
}
PAGES["long texts"].about["ranges"].extend(PURPOSES)  # type: ignore[arg-type]


#: A page -> what has to be found in it.
BAD = {
    "<p style='font-size:10px'>small": "text of 10.0 px",
    "<svg width=90 viewBox='0 0 180 9'><text y=9 font-size=9>s</text></svg>": "text of 4.5 px",
    "<p style='width:3000px'>wide " + "word " * 400: "page scrolls sideways",
    "<p style='position:absolute;left:-20px'>left": "beyond the page",
    "<div style='width:50px'><p>unbreakable": "wider than its box",
    "<p style='overflow:hidden;height:9px'>low": "higher than its box",
    "<pre style='overflow:auto'>" + "long " * 300 + "</pre>": "scrolls sideways",
    "<p>one<p style='margin-top:-35px'>two": "over another text",
    "<p style='overflow:hidden;text-overflow:ellipsis'>" + "long" * 300: "shortened",
    "<p style='display:none'>hidden</p>seen": "not shown",
    "": "no text",
}


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[Any]]]:
    """What a browser finds in all pages, in one run of it."""
    pages = {name: "".join(trace.page(each)) for name, each in PAGES.items()}
    pages |= {
        what: f"<!doctype html><body style='font-size:16px'>{body}" for body, what in BAD.items()
    }
    return complaints(pages, tmp_path_factory.mktemp("browser"))


@pytest.mark.parametrize("name", PAGES)
def test_all_text_can_be_read(name: str, checked: dict[str, list[list[Any]]]) -> None:
    """No text is cut off, lies over another one or is too small, and nothing scrolls sideways."""
    found = checked[name]
    if name == "long texts":
        assert any(what == "shortened" for _, what, _ in found)
        found = [each for each in found if each[1] != "shortened"]
    assert found == []


@pytest.mark.parametrize("wrong", BAD.values())
def test_bad_pages_are_found(wrong: str, checked: dict[str, list[list[Any]]]) -> None:
    """The check of pages itself: it finds each kind of mistake, at each width where it is one."""
    assert wrong in {what for _, what, _ in checked[wrong]}


# -- colours -------------------------------------------------------------------------------------

Colour = tuple[float, float, float]
#: What people without one kind of cone see, in linear RGB (Viénot, Brettel and Mollon 1999).
SEEN = {
    "by all": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "by protanopes": ((0.1124, 0.8876, 0), (0.1124, 0.8876, 0), (0.004, -0.004, 1)),
    "by deuteranopes": ((0.2928, 0.7072, 0), (0.2928, 0.7072, 0), (-0.0223, 0.0223, 1)),
    "without colour": ((0.2126, 0.7152, 0.0722),) * 3,
}


def palettes() -> Iterator[dict[str, Colour]]:
    """The colours of the light and of the dark scheme, in linear RGB."""
    style = (Path(trace.__file__).parent / "page.css").read_text()
    for scheme in re.findall(r":root \{(.*?)\}", style, re.DOTALL):
        found = {}
        for name, digits in re.findall(r"--([a-z]+): #([0-9a-f]{6});", scheme):
            parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
            red, green, blue = (
                part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
                for part in parts
            )
            found[name] = (red, green, blue)
        yield found


def contrast(one: Colour, other: Colour) -> float:
    """The contrast of WCAG 2.1: 1 to 21."""
    light, dark = sorted(
        (0.2126 * red + 0.7152 * green + 0.0722 * blue for red, green, blue in (one, other)),
        reverse=True,
    )
    return (light + 0.05) / (dark + 0.05)


def lab(colour: Colour) -> Colour:
    """In CIE L*a*b*, where distances are about those that people see."""
    red, green, blue = colour
    xyz = (
        (0.4124 * red + 0.3576 * green + 0.1805 * blue) / 0.9505,
        0.2126 * red + 0.7152 * green + 0.0722 * blue,
        (0.0193 * red + 0.1192 * green + 0.9505 * blue) / 1.089,
    )
    x, y, z = (
        part ** (1 / 3) if part > 0.008856 else 7.787 * max(part, 0.0) + 16 / 116 for part in xyz
    )
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def seen(colour: Colour, by: str) -> Colour:
    red, green, blue = (
        sum(weight * part for weight, part in zip(row, colour, strict=True)) for row in SEEN[by]
    )
    return red, green, blue


def test_colours_can_be_read_on_the_page() -> None:
    """Text has WCAG's contrast of 4.5, a line that of 3, in both schemes."""
    schemes = list(palettes())
    assert len(schemes) == 2
    for scheme in schemes:
        for name in ("text", "muted"):
            assert contrast(scheme[name], scheme["page"]) >= 4.5, name
            assert contrast(scheme[name], scheme["soft"]) >= 4.5, name
        for name in ("private", "host", "work", "other"):
            assert contrast(scheme[name], scheme["page"]) >= 3, name


@pytest.mark.parametrize("by", [by for by in SEEN if by != "without colour"])
def test_colours_of_one_picture_differ(by: str) -> None:
    """Also for people who see no difference between red and green."""
    for scheme in palettes():
        for one, other in (("private", "host"), ("work", "other")):
            a, b = lab(seen(scheme[one], by)), lab(seen(scheme[other], by))
            assert sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) ** 0.5 >= 25, (one, other)


def test_devices_without_room_share_a_row() -> None:
    page = "".join(trace.page(PAGES["many devices"]))
    heads = re.findall(r'<div class="head"><span title="([^"]*)">[^<]*</span><span>([^<]*)', page)
    assert heads == [
        *((f"device {n}", "30 exits") for n in range(7)),
        ("14 others", "391 exits"),
    ]


def test_no_picture_needs_its_colours() -> None:
    """Lines of one picture differ in their dashes or stand on an area; all have labels."""
    page = "".join(trace.page(PAGES["ordinary"]))
    for chart in page.split('<div class="chart">')[1:]:
        drawn = re.findall(r'<polyline class="line ([a-z0-9 ]+)"', chart)
        named = re.findall(r'<path class="line ([a-z0-9 ]+)" d="M0 5H18"', chart)
        assert set(drawn) <= set(named)
        for one, other in combinations(drawn, 2):
            dashes = [set(re.findall("dash[123]", kind)) for kind in (one, other)]
            areas = [f'class="area {kind}"' in chart for kind in (one, other)]
            assert dashes[0] != dashes[1] or areas[0] != areas[1]
