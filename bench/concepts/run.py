"""Run SAEBench (core, sparse probing, absorption) or sae-probes on an SAE that `python -m sae_lab.export` wrote.

    python bench/concepts/run.py core --sae outputs/demo/export/sae_lens --model sae_lab/lm/tiny \\
        --data outputs/concepts-data --out outputs/concepts

Without --model the SAE's model comes from the hub, without --data so do the texts: the libraries' own defaults.
Results are in the libraries' own files below --out; the numbers printed at the end are in <benchmark>.json.
"""

import argparse
import json
import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import adapter
import torch
from sae_bench.evals.absorption import main as absorption_main
from sae_bench.evals.absorption.eval_config import AbsorptionEvalConfig
from sae_bench.evals.absorption.vocab import LETTERS, get_alpha_tokens
from sae_bench.evals.core import main as core_main
from sae_bench.evals.sparse_probing import main as sparse_probing_main
from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig
from sae_bench.sae_bench_utils.activation_collection import LLM_NAME_TO_BATCH_SIZE
from sae_lens import SAE
from sae_lens.training.activations_store import ActivationsStore
from sae_probes import DATASETS, run_baseline_evals, run_sae_evals
from transformer_lens import HookedTransformer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TEXTS = "Skylion007/openwebtext"
KS = [1, 2, 5]
"""Numbers of latents that a sparse probe may use."""


def core(sae: SAE, args: argparse.Namespace) -> dict[str, float]:
    """SAEBench's core evaluation, and what its explained variance should have been on the same tokens."""
    texts = str(args.data / "texts") if args.data else TEXTS
    tokens = record_tokens()
    results = core_main.multiple_evals(
        selected_saes=[(args.name, sae)],
        n_eval_reconstruction_batches=args.batches,
        n_eval_sparsity_variance_batches=args.batches,
        compute_featurewise_density_statistics=True,  # SAEBench writes no result without these two
        compute_featurewise_weight_based_metrics=True,
        exclude_special_tokens_from_reconstruction=True,
        dataset=texts,
        output_folder="core",
        device=DEVICE,
        force_rerun=True,
    )
    groups = ("model_performance_preservation", "model_behavior_preservation", "reconstruction_quality", "sparsity")
    metrics = the_one(results)["metrics"]
    said = {name: value for group in groups for name, value in metrics[group].items()}
    return said | explained_variance(sae, tokens[-args.batches :])


def record_tokens() -> list[torch.Tensor]:
    """Return a list to which the activation store of SAELens adds every batch of tokens that it gives."""
    given, batches = ActivationsStore.get_batch_tokens, []

    def get_batch_tokens(self, *args, **kwargs):
        batches.append(given(self, *args, **kwargs))
        return batches[-1]

    ActivationsStore.get_batch_tokens = get_batch_tokens
    return batches


@torch.no_grad()
def explained_variance(sae: SAE, batches: list[torch.Tensor]) -> dict[str, float]:
    """Return 1 - fvu of batches of tokens without special ones, and the value by SAEBench 0.6.0's formula.

    With rows x, the total variance is E‖x‖² - ‖E x‖². SAEBench takes E‖x‖² - (mean over dimensions of E x²)², which
    is a square of x minus its fourth power.
    """
    model = HookedTransformer.from_pretrained_no_processing(sae.cfg.metadata.model_name, device=DEVICE)
    special = {getattr(model.tokenizer, f"{name}_token_id") for name in ("pad", "eos", "bos")} - {None}
    hook, layer = sae.cfg.metadata.hook_name, sae.cfg.hook_layer
    n, squares, residuals, total = 0, 0.0, 0.0, torch.zeros(sae.cfg.d_in, dtype=torch.float64)
    squares_by_dimension = total.clone()
    for tokens in batches:
        x = model.run_with_cache(tokens, names_filter=[hook], stop_at_layer=layer + 1, prepend_bos=False)[1][hook]
        kept = ~torch.isin(tokens, torch.tensor(sorted(special), device=tokens.device))
        x, x_hat = x[kept].double().cpu(), sae(x)[kept].double().cpu()
        n, total, squares_by_dimension = n + len(x), total + x.sum(0), squares_by_dimension + (x**2).sum(0)
        squares, residuals = squares + (x**2).sum().item(), residuals + ((x - x_hat) ** 2).sum().item()
    right = 1 - residuals / (squares - (total**2).sum().item() / n)
    theirs = 1 - (residuals / n) / (squares / n - (squares_by_dimension / n).mean().item() ** 2)
    return {"explained_variance_right": right, "explained_variance_by_their_formula": theirs}


def sparse_probing(sae: SAE, args: argparse.Namespace) -> dict[str, float]:
    """SAEBench's sparse probing: which class a text belongs to, from the mean activations of k latents."""
    config = SparseProbingEvalConfig(model_name=args.model_name, llm_dtype="float32", k_values=KS)
    config.llm_batch_size = LLM_NAME_TO_BATCH_SIZE.get(args.model_name, 32)
    if args.data:
        config.dataset_names = [adapter.use_text_classes(args.data / "kinds", n_classes=4)]
        config.probe_train_set_size, config.probe_test_set_size = 1200, 300
    results = sparse_probing_main.run_eval(config, [(args.name, sae)], DEVICE, "sparse_probing", force_rerun=True)
    metrics = the_one(results.values())["eval_result_metrics"]
    return {name: value for group in ("llm", "sae") for name, value in metrics[group].items() if value is not None}


def probes(sae: SAE, args: argparse.Namespace) -> dict[str, float]:
    """sae-probes: what the last token of a text is, from k latents; beside a probe on all dimensions of the model."""
    names = adapter.use_probe_data(args.data / "probes" / "data") if args.data else args.datasets or DATASETS
    hook, results = sae.cfg.metadata.hook_name, Path("probes")
    shared = {"model_name": args.model_name, "hook_name": hook, "setting": "normal", "datasets": names}
    shared |= {"device": DEVICE, "results_path": results, "model_cache_path": Path("probes-activations")}
    run_sae_evals(sae, reg_type="l1", ks=KS, **shared)
    run_baseline_evals(method="logreg", **shared)
    rows: dict[str, list[float]] = {}
    for name in names:
        for row in json.loads(next(results.glob(f"sae_probes_*/normal_setting/{name}_{hook}_l1.json")).read_text()):
            rows.setdefault(f"k={row['k']}", []).append(row["test_auc"])
        file = next(results.glob(f"baseline_results_*/normal_setting/{name}_{hook}_logreg.json"))
        rows.setdefault("model", []).append(json.loads(file.read_text())[0]["test_auc"])
    return {f"{key} {name}": auc for key, aucs in rows.items() for name, auc in zip(names, aucs, strict=True)}


def absorption(sae: SAE, args: argparse.Namespace) -> dict[str, float]:
    """SAEBench's absorption: how often the latents of a first letter are silent and another one stands in for them."""
    config = AbsorptionEvalConfig(model_name=args.model_name, precalc_k_sparse_probe_sae_acts=True)
    if args.words:
        model = HookedTransformer.from_pretrained_no_processing(args.model_name, device=DEVICE)
        adapter.use_words(words_by_letter(get_alpha_tokens(model.tokenizer), args.words))
        config.min_feats_for_eval = 10
    random.seed(config.random_seed)  # of the words in the prompts, which SAEBench draws without a seed
    torch.manual_seed(config.random_seed)
    adapter.stop_after(int(sae.cfg.metadata.hook_name.split(".")[1]))
    Path("absorption").mkdir(exist_ok=True)  # the one evaluation that does not make its folder
    results = absorption_main.run_eval(config, [(args.name, sae)], DEVICE, "absorption", force_rerun=True)
    result = the_one(results.values())
    return result["eval_result_metrics"]["mean"] | {"letters": len(result["eval_result_details"])}


def the_one(results: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return the result of the one SAE. SAEBench logs why there is none, and goes on."""
    if not (found := list(results)):
        raise SystemExit("SAEBench gave no result: it says why in the lines above.")
    return found[0]


def words_by_letter(vocabulary: list[str], n: int) -> list[str]:
    """Draw up to n words of each first letter."""
    rng, by_letter = random.Random(0), {letter: [] for letter in LETTERS}
    for word in sorted(vocabulary):
        by_letter[word.strip()[0].lower()].append(word)
    return [word for words in by_letter.values() for word in rng.sample(words, min(n, len(words)))]


BENCHMARKS = {function.__name__: function for function in (core, probes, sparse_probing, absorption)}


@torch.no_grad()
def in_raw_units(sae: SAE) -> SAE:
    """Give all decoder rows unit norm, so that a code times its row is a part of x.

    Absorption multiplies codes by cosines with decoder rows and compares them with projections of x. An export of
    sae.normalize=mean_norm has the scale in its weights, so that all rows have one norm: no choice of latents changes.
    """
    norms = sae.W_dec.norm(dim=1)
    if not torch.allclose(norms, norms[0].expand_as(norms), rtol=1e-4):
        sae.fold_W_dec_norm()
        return sae
    sae.W_dec /= norms[0]
    for name in ("W_enc", "b_enc", "b_gate", "b_mag", "threshold"):
        if hasattr(sae, name):
            getattr(sae, name).mul_(norms[0])
    return sae


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument("--sae", type=Path, required=True, help="folder with cfg.json and sae_weights.safetensors")
    parser.add_argument("--model", type=Path, help="folder of the model; default: by its name, from the hub")
    parser.add_argument("--data", type=Path, help="folder that data.py wrote; default: the libraries' own data")
    parser.add_argument("--out", type=Path, default=Path("outputs/concepts"), help="folder of the results")
    parser.add_argument("--batches", type=int, default=20, help="core: batches of 8 rows of 128 tokens")
    parser.add_argument("--datasets", nargs="*", help="probes: some of the data sets of sae-probes")
    parser.add_argument("--words", type=int, help="absorption: words of each letter; default: the whole vocabulary")
    args = parser.parse_args()
    for name in ("sae", "model", "data"):
        if folder := getattr(args, name):
            setattr(args, name, folder.resolve(strict=True))
    return args


def main() -> None:
    args = parse()
    sae = SAE.load_from_disk(args.sae, device=DEVICE)
    if args.benchmark == "absorption" and sae.cfg.normalize_activations != "none":
        raise SystemExit(
            "Absorption compares codes with projections of raw activations, and the codes of this SAE are in units of "
            f"each row (normalize_activations={sae.cfg.normalize_activations}): train with sae.normalize=mean_norm."
        )
    args.out.mkdir(parents=True, exist_ok=True)
    os.chdir(args.out)  # the libraries write to folders of their own in the working directory
    adapter.load_models_from_folders()
    adapter.leave_shapes_unchecked()
    args.name = args.sae.parent.parent.name if args.sae.name == "sae_lens" else args.sae.name
    args.model_name = adapter.link_model(sae, args.model) if args.model else sae.cfg.metadata.model_name
    numbers = BENCHMARKS[args.benchmark](in_raw_units(sae), args)
    Path(f"{args.benchmark}_{args.name}.json").write_text(json.dumps(numbers, indent=1))
    print("\n".join(f"{name:45} {value:.4f}" for name, value in numbers.items()))


if __name__ == "__main__":
    main()
