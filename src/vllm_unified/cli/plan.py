"""``vllm-unified plan``"""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer

from vllm_unified.cli.generate import AsJson
from vllm_unified.cli.terminal import out, print_json
from vllm_unified.hardware.detect import Hardware, detect
from vllm_unified.hardware.gpus import Gpu
from vllm_unified.hardware.planning import plan as make

_GIB = 2**30


def plan(
    model: Annotated[
        str, typer.Argument(help="A folder, a repository's id in the cache, or 'bundled'.")
    ] = "bundled",
    gpus: Annotated[
        int | None, typer.Option(min=0, help="Plan for so many GPUs in place of this machine's.")
    ] = None,
    gpu_memory: Annotated[float, typer.Option(help="GiB of each of them.")] = 80.0,
    dtype: Annotated[str | None, typer.Option(help="Such as bfloat16.")] = None,
    quantization: Annotated[str | None, typer.Option(help="Such as fp8 or awq.")] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Tokens of prompt and answer together.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Whether a model fits here, how, and the arithmetic; the command that serves it so.

    Exit code 1 if it does not fit.
    """
    hardware = detect()
    if gpus is not None:
        hardware = _with_gpus(hardware, gpus, int(gpu_memory * _GIB))
    found = make(
        model, hardware, dtype=dtype, quantization=quantization, max_model_len=max_model_len
    )
    if json:
        print_json(found)
    else:
        out.print(str(found), markup=False, highlight=False, soft_wrap=True)
    if not found.fits:
        raise typer.Exit(1)


def _with_gpus(hardware: Hardware, count: int, memory: int) -> Hardware:
    gpu = Gpu(
        name=f"a GPU of {memory / _GIB:g} GiB",
        memory_total=memory,
        memory_free=memory,
        driver="",
        compute_capability=(9, 0),
    )
    return msgspec.structs.replace(hardware, gpus=(gpu,) * count)
