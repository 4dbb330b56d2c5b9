#!/usr/bin/env bash
# Runs the trainer's tests against several versions of TRL, each in a fresh environment.
# Usage: tests/matrix.sh [VERSION ...]; a version is that of TRL, or TRL+TRANSFORMERS, or "newest".
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
versions=("$@")
if [ ${#versions[@]} -eq 0 ]; then
    versions=(1.12.0 1.12.0+5.2.0 1.14.2 1.16.0 newest)
fi
tests=(tests/test_advantages.py tests/test_trainer.py tests/test_row_skipping.py tests/test_row_selection.py tests/test_trl_behaviours.py tests/test_recipe.py)
status=0
summary=()
for version in "${versions[@]}"; do
    environment=$(mktemp -d)
    trl="trl==${version%%+*}"
    transformers="transformers"
    case $version in
        newest) trl="trl" ;;
        *+*) transformers="transformers==${version##*+}" ;;
    esac
    "$python" -m venv "$environment" &&
        "$environment/bin/pip" install --quiet --upgrade pip &&
        "$environment/bin/pip" install --quiet "$(grep '^torch==' constraints.txt)" &&
        "$environment/bin/pip" install --quiet "$(grep '^torch==' constraints.txt)" "$trl" "$transformers" '.[test]'
    installed=$?
    if [ "$version" = newest ]; then
        # Beyond the supported range on purpose, so past what setup.cfg allows.
        "$environment/bin/pip" install --quiet --upgrade --no-deps trl
    fi
    if [ $installed -ne 0 ]; then
        result="cannot be installed"
    else
        # Not the sources beside the tests: what was installed.
        output=$(HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$environment/bin/python" -P -m pytest "${tests[@]}" 2>&1)
        result=$(tail -n 1 <<<"$output")
        grep -E '^(FAILED|ERROR)' <<<"$output"
    fi
    names=$("$environment/bin/pip" list 2>/dev/null | awk '$1 == "trl" || $1 == "transformers" {printf "%s %s  ", $1, $2}')
    summary+=("$names $result")
    if [ "$version" != newest ] && ! grep -q ' passed' <<<"$result" || grep -qE ' (failed|error)' <<<"$result"; then
        [ "$version" = newest ] || status=1
    fi
    rm -rf "$environment"
done
printf '%s\n' "${summary[@]}"
exit $status
