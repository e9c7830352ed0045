"""What Neuronpedia's importer and SAEDashboard's converter ask of the files, as facts read from their repositories.

Neuronpedia at ebb8426f: apps/webapp/prisma/schema.prisma has the tables, apps/webapp/app/api/admin/import/route.ts
reads the files. Types are Prisma's: `?` may be null, `=` has a default in the database, `[]` is a list. The rows of
release.jsonl, model.jsonl, sourceset.jsonl and source.jsonl go to Prisma, which refuses unknown columns; those of
features/ and activations/ to `INSERT ... SELECT FROM jsonb_to_recordset`, with the columns of a file's first row.
SAEDashboard 0.8.0 at db4839a4: sae_dashboard/neuronpedia/neuronpedia_dashboard.py.
"""

from typing import Any

NEURON_LISTS = {
    **{f"neuron_alignment_{name}": "Float[]=" for name in ("values", "l1")},
    **{f"correlated_{part}_{name}": "Float[]=" for part in ("neurons", "features") for name in ("pearson", "l1")},
    **{f"{name}_indices": "Int[]=" for name in ("neuron_alignment", "correlated_neurons", "correlated_features")},
    **{f"{sign}_str": "String[]=" for sign in ("neg", "pos")},
    **{f"{sign}_values": "Float[]=" for sign in ("neg", "pos")},
    **{f"{h}_hist_data_bar_{name}": "Float[]=" for h in ("freq", "logits") for name in ("heights", "values")},
    "decoder_weights_dist": "Float[]=",
}

TABLES: dict[str, dict[str, str]] = {
    "release": {
        "name": "String",
        "visibility": "Visibility=",
        "isNewUi": "Boolean=",
        "featured": "Boolean=",
        "description": "String",
        "descriptionShort": "String?",
        "urls": "String[]",
        "creatorEmail": "String?",
        "creatorName": "String",
        "creatorNameShort": "String?",
        "creatorId": "String",
        "defaultSourceSetName": "String?",
        "defaultSourceId": "String?",
        "defaultUmapSourceIds": "String[]=",
    },
    "model": {
        "id": "String",
        "displayNameShort": "String=",
        "displayName": "String=",
        "creatorId": "String",
        "tlensId": "String?",
        "dimension": "Int?",
        "thinking": "Boolean=",
        "visibility": "Visibility=",
        "defaultSourceSetName": "String?",
        "defaultSourceId": "String?",
        "inferenceEnabled": "Boolean=",
        "instruct": "Boolean=",
        "layers": "Int",
        "neuronsPerLayer": "Int",
        "owner": "String",
        "website": "String?",
    },
    "sourceset": {
        "modelId": "String",
        "name": "String",
        "hasDashboards": "Boolean=",
        "visibility": "Visibility=",
        "description": "String",
        "type": "String=",
        "creatorName": "String",
        "urls": "String[]",
        "creatorEmail": "String?",
        "creatorId": "String",
        "releaseName": "String?",
        "defaultRange": "Int=",
        "defaultShowBreaks": "Boolean=",
    },
    "source": {
        "id": "String",
        "modelId": "String",
        "hasDashboards": "Boolean=",
        "saelensRelease": "String?",
        "saelensSaeId": "String?",
        "hfRepoId": "String?",
        "hfFolderId": "String?",
        "visibility": "Visibility=",
        "setName": "String",
        "creatorId": "String",
        "num_prompts": "Int?",
        "num_tokens_in_prompt": "Int?",
        "dataset": "String?",
        "notes": "String?",
    },
    "features": {
        "modelId": "String",
        "layer": "String",
        "index": "String",
        "sourceSetName": "String?",
        "creatorId": "String?",
        "maxActApprox": "Float?",
        "hasVector": "Boolean=",
        "vector": "Float[]=",
        "hookName": "String?",
        "topkCosSimIndices": "Int[]=",
        "topkCosSimValues": "Float[]=",
        "frac_nonzero": "Float=",
        **NEURON_LISTS,
    },
    "activations": {
        "id": "String",
        "tokens": "String[]",
        "dataIndex": "String?",
        "index": "String",
        "layer": "String",
        "modelId": "String",
        "dataSource": "String?",
        "maxValue": "Float",
        "maxValueTokenIndex": "Int",
        "minValue": "Float",
        "values": "Float[]",
        "dfaValues": "Float[]=",
        "creatorId": "String",
        "lossValues": "Float[]=",
        "binMin": "Float?",
        "binMax": "Float?",
        "binContains": "Float?",
        "qualifyingTokenIndex": "Int?",
    },
}

BATCH = {"model_id": "String", "layer": "Int", "sae_set": "String", "sae_id_suffix": "String?", "features": "Json"}
FEATURE = {
    **{name: kind.rstrip("=") for name, kind in NEURON_LISTS.items()},
    "feature_index": "Int",
    "frac_nonzero": "Float",
    "n_prompts_total": "Int",
    "n_tokens_in_prompt": "Int",
    "dataset": "String",
    "activations": "Json",
    "vector": "Float[]",
}
ACTIVATION = {
    **dict.fromkeys(("bin_min", "bin_max", "bin_contains"), "Float"),
    "tokens": "String[]",
    "values": "Float[]",
    "qualifying_token_index": "Int",
}

PYTHON: dict[str, tuple[type, ...]] = {
    "String": (str,),
    "Int": (int,),
    "Float": (int, float),
    "Boolean": (bool,),
    "Json": (list, dict),
}


def check_row(row: dict[str, Any], table: dict[str, str]) -> None:
    """Assert that a row has every column that is needed, none that is unknown, and values of the right types."""
    needed = {name for name, kind in table.items() if not kind.endswith(("?", "="))}
    assert needed <= row.keys() <= table.keys(), (needed - row.keys(), row.keys() - table.keys())
    for name, value in row.items():
        kind = table[name].rstrip("=")
        if kind.endswith("?") and value is None:
            continue
        kind = kind.rstrip("?")
        if kind == "Visibility":
            assert value in ("PUBLIC", "UNLISTED", "PRIVATE"), name
            continue
        assert isinstance(value, list) == (kind.endswith("[]") or kind == "Json"), name
        for entry in value if kind.endswith("[]") else [value]:
            assert isinstance(entry, PYTHON[kind.removesuffix("[]")]), (name, entry)
            assert isinstance(entry, bool) == (kind == "Boolean"), (name, entry)
