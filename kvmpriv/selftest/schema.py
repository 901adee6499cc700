"""A document against ``schema.json``: as much of JSON Schema as that uses, without its package."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

__all__ = ["check"]

_SCHEMA = json.loads(Path(__file__).with_name("schema.json").read_text(encoding="utf-8"))
_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
}


def check(value: Any, schema: dict[str, Any] = _SCHEMA, where: str = "") -> None:
    """ValueError, if the value at `where` in a document is not what the schema wants there."""

    def must(holds: bool, be: str) -> None:
        if not holds:
            shown = json.dumps(value)
            shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
            raise ValueError(f"{where or 'the document'} is {shown}, not {be}")

    if "$ref" in schema:
        check(value, _SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")], where)
    if kind := schema.get("type"):
        must(type(value) in _TYPES[kind], f"of type {kind}")
    choices = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if choices:  # True == 1
        same = any(type(value) is type(choice) and value == choice for choice in choices)
        must(same, " or ".join(map(json.dumps, choices)))
    if isinstance(value, (int, float)):
        must(abs(value) <= sys.float_info.max, "finite")  # json reads Infinity and NaN
        must(value >= schema.get("minimum", value), f"{schema.get('minimum')} or more")
        if "exclusiveMinimum" in schema:
            must(value > schema["exclusiveMinimum"], f"above {schema['exclusiveMinimum']}")
    elif isinstance(value, str):
        must(len(value) >= schema.get("minLength", 0), "longer")
        must(bool(re.search(schema.get("pattern", ""), value)), f"like {schema.get('pattern')}")
    elif isinstance(value, list):
        for at, item in enumerate(value):
            check(item, schema["items"], f"{where}[{at}]")
        if schema.get("uniqueItems"):
            must(len(set(value)) == len(value), "without repetitions")
    elif isinstance(value, dict):
        must(len(value) >= schema.get("minProperties", 0), "larger")
        for name in schema.get("required", ()):
            if name not in value:
                raise ValueError(f"no {name!r}{where and f' in {where}'}")
        for name, item in value.items():
            check(name, schema.get("propertyNames", {}), f"a name in {where}")
            of_name = schema.get("properties", {}).get(name, schema["additionalProperties"])
            if of_name is False:
                raise ValueError(f"nothing is called {name!r}{where and f' in {where}'}")
            check(item, of_name, f"{where}.{name}".removeprefix("."))
