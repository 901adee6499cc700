"""Helpers that ask a C compiler and the running kernel's BTF what the kernel's ABI is."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

Layout = tuple[int, dict[str, int]]  # size, field -> offset, in bytes

VMLINUX_BTF = Path("/sys/kernel/btf/vmlinux")


def members(kind: Any, prefix: str = "", base: int = 0) -> dict[str, int]:
    """Every named field of a cffi struct type, those of inner structs too: path -> offset."""
    found = {}
    for name, field in kind.fields:
        if name:
            found[prefix + name] = base + field.offset
        if field.type.kind in ("struct", "union") and not field.type.cname.startswith("struct kvm"):
            inner = f"{prefix}{name}." if name else prefix
            found |= members(field.type, inner, base + field.offset)
    return found


def layouts(ffi: Any) -> dict[str, Layout]:
    """Every struct that an FFI knows."""
    return {
        name: (ffi.sizeof(f"struct {name}"), members(ffi.typeof(f"struct {name}")))
        for name in ffi.list_types()[1]
        if not name.startswith("$")
    }


def compile_and_run(source: str, folder: Path, *options: str) -> str:
    """Compile a C program and run it; returns what it prints."""
    code, program = folder / "ask.c", folder / "ask"
    code.write_text(source)
    subprocess.run(["cc", "-Wall", "-Werror", *options, "-o", program, code], check=True)
    return subprocess.run([program], check=True, capture_output=True, text=True).stdout


def ask_compiler(
    headers: list[str],
    structs: dict[str, Layout],
    constants: dict[str, int],
    folder: Path,
    *options: str,
) -> tuple[dict[str, Layout], dict[str, int]]:
    """The same structs and constants by a compiler that includes `headers`.

    Constants that the headers do not define are left out.
    """
    lines = ["#include <stddef.h>", "#include <stdio.h>", *(f"#include {name}" for name in headers)]
    lines.append("int main(void) {")
    for name, (_, fields) in structs.items():
        lines.append(f'printf("size {name} . %zu\\n", sizeof(struct {name}));')
        lines += (
            f'printf("field {name} {field} %zu\\n", offsetof(struct {name}, {field}));'
            for field in fields
        )
    for name in constants:
        lines += [f"#ifdef {name}", f'printf("constant . {name} %llu\\n",']
        lines += [f"(unsigned long long)({name}));", "#endif"]
    lines.append("return 0; }")
    found: dict[str, Layout] = {}
    values = {}
    for line in compile_and_run("\n".join(lines), folder, *options).splitlines():
        what, struct, name, number = line.split()
        if what == "size":
            found[struct] = (int(number), {})
        elif what == "field":
            found[struct][1][name] = int(number)
        else:
            values[name] = int(number)
    return found, values


class Btf:
    """The types of the running kernel, by bpftool."""

    def __init__(self) -> None:
        tool = shutil.which("bpftool", path="/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/sbin")
        if tool is None:
            raise FileNotFoundError("bpftool is not installed")
        dump = subprocess.run(
            [tool, "-j", "btf", "dump", "file", VMLINUX_BTF], check=True, capture_output=True
        )
        types = json.loads(dump.stdout)["types"]
        self._by_id = {entry["id"]: entry for entry in types}
        self._structs = {
            entry["name"]: entry for entry in types if entry["kind"] == "STRUCT" and entry["name"]
        }

    def layout(self, name: str) -> Layout | None:
        """A struct's layout; None when the kernel does not have it."""
        entry = self._structs.get(name)
        return None if entry is None else (entry["size"], self._members(entry))

    def _members(self, entry: dict[str, Any], prefix: str = "", base: int = 0) -> dict[str, int]:
        found = {}
        for member in entry["members"]:
            offset = base + member["bits_offset"] // 8
            name = member["name"]
            if name and name != "(anon)":
                found[prefix + name] = offset
            inner = self._resolve(member["type_id"])
            if inner is not None and not inner["name"].startswith("kvm"):
                anonymous = not name or name == "(anon)"
                found |= self._members(inner, prefix if anonymous else f"{prefix}{name}.", offset)
        return found

    def _resolve(self, type_id: int) -> dict[str, Any] | None:
        entry = self._by_id.get(type_id)
        while entry is not None and entry["kind"] in ("TYPEDEF", "CONST", "VOLATILE"):
            entry = self._by_id.get(entry["type_id"])
        return entry if entry is not None and entry["kind"] in ("STRUCT", "UNION") else None
