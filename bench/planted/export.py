"""Judge an SAE on planted rows by this project, and write what SAELens needs to judge it on the same rows.

    python bench/planted/export.py RUN_FOLDER OUT [SAE_FOLDER]

RUN_FOLDER is a run of `sae_lab.planted planted=hierarchy`. SAE_FOLDER is another SAE to judge in the run's place, in
any format that `load_sae` reads. OUT gets rows.safetensors, sae/ (the export to SAELens) and ours.json. Then
saelens_judge.py, in an environment with sae-lens, prints both judgements.
"""

import sys
from pathlib import Path

from omegaconf import OmegaConf
from safetensors.torch import save_file

from sae_lab.interop import sae_lens
from sae_lab.interop.load import load_sae
from sae_lab.runs.trust import check_trusted
from sae_lab.runtime.build import build
from sae_lab.runtime.files import read_json, write_json
from sae_lab.studies.recovery import recovery

N_ROWS = 16_384

run_dir, out, *other = map(Path, sys.argv[1:])
config = read_json(run_dir / "planted.json")["config"]
check_trusted(config, run_dir / "planted.json")
planted = build(OmegaConf.create(config), "planted")
sae = load_sae(other[0] if other else run_dir / "sae")
rows = planted.rows_at(0, N_ROWS, planted.seed + 10**6)
out.mkdir(parents=True, exist_ok=True)
tables = {"directions": planted.directions, "offset": planted.offset, "strengths": rows.strengths}
save_file({name: t.contiguous() for name, t in tables.items()}, out / "rows.safetensors")
sae_lens.write(sae, out / "sae", {})
write_json(out / "ours.json", recovery(sae, planted, N_ROWS).figures)
