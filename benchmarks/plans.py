"""Plans of the study's stage 1 for four TPU machines: what the compiler says beside the arithmetic.

    pip install -e '.[plan]' && python benchmarks/plans.py

Compiling takes minutes a machine. --read=FOLDER takes plans that lie there, as `--json` of
launch/plan.py wrote them (v5e-4x4.json …), and compiles what is missing into it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
from dated import ROOT, page, table, write

PLAN = "python launch/plan.py --config=configs/mtllm.py:llama3-8b --topology=TOPOLOGY"
TOPOLOGIES = ("v5e:4x4", "v5e:16x16", "v6e:2x4", "v5p:4x4x4")
PACKAGES = ("jax", "flax", "libtpu")
KINDS = ("frozen", "trainable", "optimizer", "activations")
MOST = 0.15  # that the arithmetic's memory may be off


def plan(topology: str, folder: Path) -> dict[str, Any]:
    """The numbers of one plan, made unless they lie in `folder`."""
    path = folder / f"{topology.replace(':', '-')}.json"
    if not path.exists():
        flags = ["--config=configs/mtllm.py:llama3-8b", f"--topology={topology}", f"--json={path}"]
        subprocess.run([sys.executable, "launch/plan.py", *flags], cwd=ROOT, check=True)
    return json.loads(path.read_text(encoding="utf-8"))


def memory(plans: list[dict[str, Any]]) -> pd.DataFrame:
    """GB of a chip by kind, and how far the arithmetic is off."""
    rows = []
    for one in plans:
        compiler, arithmetic = one["hbm_gb_per_chip"], one["hbm_gb_per_chip_analytic"]
        kinds, other = one["hbm_gb_by_kind"], one["hbm_gb_by_kind_analytic"]
        rows.append(
            {"machine": one["machine"]}
            | {kind: f"{kinds[kind]:.2f}" for kind in KINDS}
            | {"activations, arithmetic": f"{other['activations']:.2f}"}
            | {"peak": f"{compiler:.2f}", "peak, arithmetic": f"{arithmetic:.2f}"}
            | {"off by": f"{arithmetic / compiler - 1:+.1%}"}
            | {"usable": f"{one['hbm_gb_usable']:.2f}"}
        )
    return pd.DataFrame(rows)


def traffic(plans: list[dict[str, Any]]) -> pd.DataFrame:
    """GB that a chip receives in a step, by kind of collective."""
    rows = []
    for one in plans:
        for source in ("", "_analytic"):
            found = one[f"collective_gb_per_chip{source}"]
            rows.append(
                {"machine": one["machine"], "by": "arithmetic" if source else "compiler"}
                | {kind: f"{size:.2f}" for kind, size in found.items()}
                | {"all": f"{sum(found.values()):.2f}"}
            )
    frame = pd.DataFrame(rows).fillna("")
    return frame[[*(name for name in frame.columns if name != "all"), "all"]]


def time(plans: list[dict[str, Any]]) -> pd.DataFrame:
    """Lower bounds of a step, and what they come to."""
    return pd.DataFrame(
        {
            "machine": one["machine"],
            "model FLOPs": f"{one['model_flops_per_step']:.3g}",
            "run FLOPs": f"{one['flops_per_step']:.3g}",
            **{name: f"{value:.3f}" for name, value in one["step_seconds"].items()},
            "bound by": one["bound_by"],
            "MFU at best": f"{one['mfu_at_roofline']:.0%}",
            "source tokens/s/chip": round(one["tokens_per_second_per_chip"]),
            "chip-hours": round(one["chip_hours"], 1),
            "largest batch": one["largest_batch"],
            "compiled in, s": round(one["compile_seconds"]),
        }
        for one in plans
    )


def main() -> None:
    """Make the plans, hold the arithmetic to the compiler, leave the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--read", help="folder of plans made before")
    folder = Path(parser.parse_args().read or tempfile.mkdtemp(prefix="plans-"))
    plans = [plan(topology, folder) for topology in TOPOLOGIES]
    first = plans[0]
    body = f"""
Stage 1 of `llama3-8b`: NLLB-200-distilled-600M's encoder under Llama 3 8B, a step of
{first["batch_rows"]} rows of {first["source_length"]} + {first["target_length"]} tokens, all chips
along `fsdp`, remat {first["remat"]}. Each plan is that of

    {PLAN}

Memory of a chip in GB of 10⁹ bytes. What lies there between steps is exact for both; activations
and the peak are the compiler's, then those of the arithmetic.

{table(memory(plans))}

Received by a chip in a step, GB:

{table(traffic(plans))}

A step's time at best, in seconds, as if each of compute, memory and network were alone, and what
the 10,000 steps come to if all three overlap. Nothing here was compared with a TPU's clock.

{table(time(plans))}
"""
    command = "pip install -e '.[plan]' && python benchmarks/plans.py"
    write("plans", page("Plans of stage 1 on four TPU machines", command, PACKAGES, body))
    for one in plans:
        off = one["hbm_gb_per_chip_analytic"] / one["hbm_gb_per_chip"] - 1
        if one["source"] == "compiler" and abs(off) > MOST:
            sys.exit(f"{one['machine']}: the arithmetic is off by {off:.0%}")


if __name__ == "__main__":
    main()
