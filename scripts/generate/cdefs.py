"""Write the generated part of kvmpriv/cdefs from cdefs/*.h, as cdefs/README.md describes.

Three files for each header: the module, its type stub, and a module with a Protocol per struct;
and exit_reason.py and enums.py, with the names of what is shown to people.
With --check, write nothing and exit with 1 unless all of them are current.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import keyword
import re
import sys
import tempfile
from itertools import takewhile
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import cffi

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
CORE = "kvm"
TARGET = ROOT / "kvmpriv" / "cdefs"
#: This enum has a module of its own, because a program's first exit loads it.
FIRST = "ExitReason"
#: The enums: class -> base, pattern of the constants, noun for a number without a name, docstring.
ENUMS = {
    "ExitReason": ("NamedInt", "KVM_EXIT_{}", "exit", "Why KVM_RUN returned: kvm_run.exit_reason."),
    "Cap": ("NamedInt", "KVM_CAP_{}", "capability", "What KVM_CHECK_EXTENSION is asked for."),
    "SystemEvent": ("NamedInt", "KVM_SYSTEM_EVENT_{}", "event", "kvm_run.system_event.type."),
    "InternalError": ("NamedInt", "KVM_INTERNAL_ERROR_{}", "error", "kvm_run.internal.suberror."),
    "MpState": ("NamedInt", "KVM_MP_STATE_{}", "state", "What a vCPU waits for: kvm_mp_state."),
    "VmType": ("NamedInt", "KVM_X86_{}_VM", "type", "The argument of KVM_CREATE_VM."),
    "MemFlag": ("NamedFlag", "KVM_MEM_{}", "flags", "Flags of a memory slot."),
}
#: Constants that a pattern above matches, and that are not of its kind.
OTHERS = re.compile("KVM_EXIT_IO_|KVM_INTERNAL_ERROR_EMULATION_FLAG_")
#: The headers, CORE first, each with a suffix for the members of enums: where a header gives a name
#: another value than those before it, the member gets the suffix.
HEADERS = {
    CORE: "",
    "guest_memfd": "",
    "restrictedmem": "_V9",
    "restrictedmem_v10": "_V10",
    "unmerged": None,  # not in enums: its numbers have other names elsewhere
    "vhost": None,  # none of its numbers is KVM's
}
#: Two structs that begin with so many equal fields share a class.
SHARED_FIELDS = 12
NOTE = "Generated from cdefs/{name}.h by `make cdefs`: edit the header instead."


def load_cdecl() -> ModuleType:
    """kvmpriv.cdecl without kvmpriv itself, which can't be imported while a constant is missing."""
    package = ModuleType("kvmpriv")
    package.__path__ = [str(ROOT / "kvmpriv")]
    sys.modules["kvmpriv"] = package
    return importlib.import_module("kvmpriv.cdecl")


def number(value: int) -> str:
    return f"{value:#x}" if value > 255 else str(value)


def module(name: str, ffi: cffi.FFI, parsed: Any) -> str:
    """The module: cffi's tables, the constants, the names of the ioctls."""
    ffi.set_source(f"kvmpriv.cdefs.{name}", None)
    with tempfile.TemporaryDirectory() as scratch:
        emitted = Path(scratch) / "module.py"
        with contextlib.redirect_stdout(io.StringIO()):  # cffi reports what it writes
            ffi.emit_python_code(str(emitted))
        tables = emitted.read_text().replace("# auto-generated file\n", "")
    lines = [f'"""{NOTE.format(name=name)}"""', "", tables.strip(), ""]
    lines += (f"{constant} = {number(value)}" for constant, value in parsed.constants.items())
    lines += ["", "#: ioctl number -> name", "REQUESTS = {"]
    lines += (f'    {request:#x}: "{text}",' for request, text in parsed.requests.items())
    return "\n".join([*lines, "}", ""])


def _class(name: str, parents: str, about: str, fields: list[str]) -> str:
    lines = [
        f"class {name}({parents}):",
        f'    """{about}"""',
        "",
        *(f"    {one}" for one in fields),
    ]
    return "\n".join([*lines, ""])


class Structs:
    """The Protocols of one header's structs."""

    def __init__(self, name: str, ffi: Any, imported: set[str]) -> None:
        self.name = name
        self.ffi = ffi
        self.imported = imported  # the structs of kvm.h, where this is another header
        self.used: set[str] = set()
        #: Class -> its docstring and its fields.
        self.classes: dict[str, tuple[str, list[str]]] = {}
        tags = (tag for tag in ffi.list_types()[1] if not tag.startswith("$"))
        self.tags = sorted(tag for tag in tags if tag not in imported)
        for tag in self.tags:
            self._add(tag, ffi.typeof(f"struct {tag}"), f"struct {tag}")

    def _add(self, class_name: str, kind: Any, title: str) -> None:
        fields = list(self._fields(class_name, kind))
        self.classes[class_name] = (f"{title}: {self.ffi.sizeof(kind)} bytes.", fields)

    def _bodies(self) -> Iterator[str]:
        """The classes; a struct that begins as a longer one does shares that beginning's class."""
        bases: dict[str, str] = {}
        for name, newer in zip(self.tags, self.tags[1:], strict=False):
            pairs = zip(self.classes[name][1], self.classes[newer][1], strict=False)
            common = len([*takewhile(lambda pair: pair[0] == pair[1], pairs)])
            if common >= SHARED_FIELDS:
                bases[name] = bases[newer] = base = f"{name}_common"
                head = self.classes[name][1][:common]
                yield _class(base, "Protocol", f"How {name} and {newer} begin.", head)
                for tag in (name, newer):
                    about, fields = self.classes[tag]
                    self.classes[tag] = (about, fields[common:])
        for name, (about, fields) in self.classes.items():
            parents = f"{bases[name]}, Protocol" if name in bases else "Protocol"
            yield _class(name, parents, about, fields)

    def _fields(self, owner: str, kind: Any) -> Iterator[str]:
        for name, field in kind.fields:
            if not name:  # an anonymous struct or union: its fields are the owner's
                yield from self._fields(owner, field.type)
            elif keyword.iskeyword(name):
                raise SystemExit(f"{self.name}.h: {owner}.{name}: the name is a Python keyword")
            else:
                python, c = self._type(f"{owner}_{name}", field.type)
                yield f"{name}: {python}  # {c}" if c else f"{name}: {python}"

    def _type(self, inner: str, kind: Any) -> tuple[str, str]:
        """The Python type and the C type of a field; `inner` names a struct without a tag."""
        if kind.kind == "array":
            python, c = self._type(inner, kind.item)
            base, bracket, rest = c.partition("[")
            length = "" if kind.length is None else kind.length
            return f"Array[{python}]", f"{base or python}[{length}]{bracket}{rest}"
        if kind.kind in ("struct", "union"):
            tag = kind.cname.removeprefix(f"{kind.kind} ")
            if tag.startswith("$"):
                self._add(inner, kind, f"{kind.kind}, a field of another")
                return inner, kind.kind
            self.used.add(tag)
            return tag, ""
        if kind.kind == "pointer":
            return "object", kind.cname
        if kind.cname == "char":
            return "bytes", "char"
        signed = int(self.ffi.cast(kind, -1)) < 0
        return "int", f"__{'s' if signed else 'u'}{8 * self.ffi.sizeof(kind)}"

    def text(self) -> str:
        """The module with the Protocols."""
        body = "\n\n".join(self._bodies())
        shared = sorted(self.used & self.imported)
        lines = [
            f'"""The structs of cdefs/{self.name}.h, for annotations.',
            "",
            "A Protocol per struct, with its name and its fields; the objects are cffi pointers.",
            NOTE.format(name=self.name),
            '"""',
            "",
            "from __future__ import annotations",
            "",
            "from typing import Protocol",
            "",
        ]
        if "Array[" in body:
            lines.append("from .cffi_types import Array")
        if shared:
            lines.append(f"from .{CORE}_structs import {', '.join(shared)}")
        names = sorted(re.findall(r"^class (\w+)", body, re.MULTILINE))
        if lines[-1]:
            lines.append("")
        lines += ["__all__ = [", *(f'    "{name}",' for name in names), "]", "", "", ""]
        return "\n".join(lines) + body


def stub(name: str, structs: Structs, parsed: Any) -> str:
    """The module's type stub: constants are ints, and new() knows a struct by its name."""
    lines = [
        f"# {NOTE.format(name=name)}",
        '# mypy: disable-error-code="overload-overlap"',
        "",
        "from typing import Final, Literal, Protocol, overload",
        "",
        "from .cffi_types import Cdata, CType, Ffi",
    ]
    if structs.tags:
        lines.append(f"from .{name}_structs import {', '.join(structs.tags)}")
    lines += ["", "class _Ffi(Ffi, Protocol):"]
    for tag in structs.tags:
        lines.append("    @overload")
        lines.append(
            f'    def new(self, cdecl: Literal["struct {tag} *"], init: object = ..., /)'
            f" -> {tag}: ..."
        )
    lines.append("    @overload")
    lines.append("    def new(self, cdecl: str | CType, init: object = ..., /) -> Cdata: ...")
    lines += ["", "ffi: Final[_Ffi]", ""]
    lines += (
        f"{constant}: Final[int] = {number(value)}" for constant, value in parsed.constants.items()
    )
    return "\n".join([*lines, "", "REQUESTS: Final[dict[int, str]]", ""])


def enums(names: list[str], constants: dict[str, dict[str, int]]) -> str:
    """A module with these enums, from each header's constants."""
    bases = sorted({ENUMS[name][0] for name in names})
    lines = [
        '"""Names for numbers, where they are shown.',
        "",
        "Generated by `make cdefs`: edit cdefs/*.h or scripts/generate/cdefs.py instead.",
        '"""',
        "",
        f"from .named import {', '.join(bases)}, named",
        "",
        f"__all__ = {sorted(names)}".replace("'", '"'),
        "",
    ]
    for name in names:
        base, pattern, noun, doc = ENUMS[name]
        prefix, _, suffix = pattern.partition("{}")
        members: dict[str, int] = {}
        for header, mark in HEADERS.items():
            if mark is None:
                continue
            for constant, value in constants[header].items():
                if OTHERS.match(constant) or not re.fullmatch(f"{prefix}.+{suffix}", constant):
                    continue
                member = constant.removeprefix(prefix).removesuffix(suffix)
                if members.get(member, value) != value:
                    member += mark
                members[member] = value
        lines += ["", f'@named("{pattern}", "{noun}")'] if base == "NamedInt" else [""]
        lines += [f"class {name}({base}):", f'    """{doc}"""', ""]
        # Of two names for one value the older is shown: PRIVATE, which is what both ABIs mean.
        age = {member: -place for place, member in enumerate(members)}
        ordered = sorted(members.items(), key=lambda item: (item[1], age[item[0]]))
        lines += [*(f"    {member} = {number(value)}" for member, value in ordered), ""]
    return "\n".join(lines)


def generate() -> dict[Path, str]:
    if unlisted := sorted({path.stem for path in (ROOT / "cdefs").glob("*.h")} - HEADERS.keys()):
        sys.exit(f"cdefs/{unlisted[0]}.h is not in HEADERS of {Path(__file__).relative_to(ROOT)}")
    cdecl = load_cdecl()
    core = cffi.FFI()
    core.cdef(cdecl.PRELUDE)
    known: dict[str, int] = {}
    shared: set[str] = set()
    files: dict[Path, str] = {}
    constants: dict[str, dict[str, int]] = {}
    for name in HEADERS:
        ffi = core if name == CORE else cffi.FFI()
        if name != CORE:
            ffi.include(core)
        parsed = cdecl.parse((ROOT / "cdefs" / f"{name}.h").read_text(), ffi, known)
        constants[name] = parsed.constants
        structs = Structs(name, ffi, shared)
        if name == CORE:
            known = parsed.constants
            shared = set(structs.tags)
        files[TARGET / f"{name}.py"] = module(name, ffi, parsed)
        files[TARGET / f"{name}.pyi"] = stub(name, structs, parsed)
        files[TARGET / f"{name}_structs.py"] = structs.text()
    files[TARGET / "exit_reason.py"] = enums([FIRST], constants)
    files[TARGET / "enums.py"] = enums([name for name in ENUMS if name != FIRST], constants)
    return files


def main() -> int:
    files = generate()
    stale = [path for path in files if not path.exists() or path.read_text() != files[path]]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not current: run `make cdefs`", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(files[path])
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
