"""Compile Triton's kernels for devices that need not be here, and print what came of it as JSON: one object each."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gpuclust.cluster.backends.base import SLICE
from gpuclust.kernels.triton import accumulate, assign

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
VALUES = {torch.float16: "fp16", torch.bfloat16: "i16", torch.float32: "fp32", torch.float64: "fp64"}
CASES = [(torch.float32, 16), (torch.bfloat16, 128), (torch.float64, 1024), (torch.float16, 4096)]


def compile_for(capability: int, kernel: Any, types: dict[str, str], constants: dict[str, Any], **options: Any) -> Any:
    """The kernel with these argument types; what is not among them is a whole number or a constant."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    # As at run time: torch's memory is aligned, and so are rows of a multiple of 16 features.
    aligned = [name for name in names if signature[name].startswith("*") or name in ("d", "x_row", "width")]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def facts(capability: int, kernel: Any, made: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()

        def dump(option: str) -> str:
            return subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout

        ((registers, stack),) = re.findall(r"REG:(\d+) STACK:(\d+)", dump("--dump-resource-usage"))
        machine = dump("--dump-sass")
    return {
        "capability": capability,
        "shared_bytes": made.metadata.shared,
        "registers": int(registers),
        "stack_bytes": int(stack),
        "tensor_core_products": len(re.findall(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b", machine)),
        "minima_that_keep_nan": made.asm["ptx"].count("min.NaN.f32"),
        "fused_doubles": machine.count("DFMA"),
        "atomic_adds": len(re.findall(r"(?:RED|ATOM\w*)\S*\.F64", machine)),
        "any_value": [parameter.name for parameter in kernel.params if parameter.do_not_specialize],
    }


def main() -> None:
    found = []
    for capability in (80, 90, 100):
        for dtype, d in CASES:
            shape = assign.Shape.of(d, dtype.itemsize)
            real = "*fp64" if dtype == torch.float64 else "*fp32"
            types = {"x": f"*{VALUES[dtype]}", "matrix": "*fp16", "shift": real, "scale": real}
            types |= dict.fromkeys(("norms", "low", "high", "slope"), "*fp32") | {"labels": "*i32", "uncertain": "*i8"}
            constants = {
                "x_feature": 1,
                "ROWS": shape.rows,
                "CLUSTERS": shape.clusters,
                "FEATURES": shape.features,
                "SLICE": SLICE,
                "WHOLE": shape.whole,
                "FLUSH": d > SLICE,
            }
            kernel, options = assign.assign_kernel, {"num_warps": shape.warps, "num_stages": shape.stages}
            made = facts(capability, kernel, compile_for(capability, kernel, types, constants, **options))
            found.append({"kernel": "assign", "dtype": str(dtype), "d": d, "whole": shape.whole, **made})
        types = {"x": "*fp32", "plus": "*i32", "minus": "*i32"}
        types |= dict.fromkeys(("weights", "magic", "sums", "counts"), "*fp64")
        constants = {"x_feature": 1, "ROWS": accumulate.ROWS, "FEATURES": accumulate.FEATURES}
        constants |= {"WEIGHTED": True, "FIRST": False}
        kernel, options = accumulate.accumulate_kernel, {"num_warps": accumulate.WARPS, "enable_fp_fusion": False}
        made = facts(capability, kernel, compile_for(capability, kernel, types, constants, **options))
        found.append({"kernel": "accumulate", **made})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
