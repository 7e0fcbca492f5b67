#!/usr/bin/env bash
# Collects what benchmarks/gpu.py needs on a machine without a network that has PyTorch, Transformers, scikit-learn,
# pandas, pyarrow, matplotlib and pytest: wheels for Python 3.12 on Linux x86-64 in FOLDER, the small trained models in
# FOLDER/shared. Says how large that is, with the checkout.
#
#   benchmarks/gpu_wheels.sh FOLDER [MODELS]        MODELS: a folder with stories260K and babyllama-105, if there is one
#
# Take FOLDER and the checkout there by hand, then:
#
#   python3 -m pip install --no-index --no-deps --target SITE FOLDER/*.whl
#   PYTHONPATH=SITE MODEGPT_SHARED=FOLDER/shared python3 benchmarks/gpu.py --minutes 9 --output RECORDS
set -euo pipefail

folder=${1:?usage: benchmarks/gpu_wheels.sh FOLDER [MODELS]}
models=${2:-}
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
most_bytes=60000000

# Hydra; lm-evaluation-harness, what it imports and the data sets it may load; what the configuration is checked with
binary=(
    hydra-core omegaconf
    lm_eval evaluate datasets dill multiprocess xxhash more-itertools
    pytablewriter DataProperty mbstrdecoder pathvalidate tabledata tcolorpy typepy
    nltk sacrebleu chardet pytz
    pydantic pydantic_core annotated-types typing-inspection
)
source_only=(antlr4-python3-runtime rouge_score sqlitedict word2number)

pinned() { # name==version, as constraints.txt has it
    local line
    line=$(grep -i "^${1//_/[-_]}==" "$checkout/constraints.txt") ||
        { echo "no version of $1 in constraints.txt" >&2; exit 1; }
    echo "$line"
}

mkdir -p "$folder"
rm -f "$folder"/*.whl
for name in "${binary[@]}"; do
    requirement=$(pinned "$name")
    python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
        -d "$folder" "$requirement"
done
for name in "${source_only[@]}"; do
    python3 -m pip wheel -q --no-deps -w "$folder" "$(pinned "$name")"
done

if [ -n "$models" ]; then
    mkdir -p "$folder/shared/models"
    cp -R "$models/stories260K" "$models/babyllama-105" "$folder/shared/models/"
fi

tracked=$(git -C "$checkout" ls-tree -r -l HEAD | awk '{ bytes += $4 } END { print bytes }')
brought=$(find "$folder" -type f -print0 | xargs -0 cat | wc -c)
echo "checkout $((tracked / 1000000)) MB, $folder $((brought / 1000000)) MB, at most $((most_bytes / 1000000)) MB together"
[ $((tracked + brought)) -le $most_bytes ]
