#!/usr/bin/env bash
# scripts/launch with shells as its processes: launch_test.sh PATH/TO/launch
# shellcheck disable=SC2016 # expanded by the shells that are launched
set -euo pipefail

launch=$1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
failures=0

# expect WHAT FOUND EXPECTED
expect() {
  if [[ $2 == "$3" ]]; then return; fi
  echo "$1: found '$2', expected '$3'"
  failures=$((failures + 1))
}

# run_launch ARGUMENTS...: sets `code`, `output` (of stdout and stderr) and `seconds`.
run_launch() {
  local start=$SECONDS
  code=0
  output=$("$launch" "$@" 2>&1) || code=$?
  seconds=$((SECONDS - start))
}

# Each process is told its rank, and all the same place to meet.
unset MASTER_ADDR MASTER_PORT OMP_NUM_THREADS
export LAUNCH_GRACE=2
run_launch 3 /bin/sh -c 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR:$MASTER_PORT $OMP_NUM_THREADS" >"$0/env$RANK"' "$folder"
expect "exit code of success" "$code" 0
cores=$(nproc)
port=$(sed 's/.*:\([0-9]*\) .*/\1/' "$folder/env0")
for rank in 0 1 2; do
  expect "environment of process $rank" "$(cat "$folder/env$rank")" \
    "$rank $rank 3 127.0.0.1:$port $((cores > 3 ? cores / 3 : 1))"
done

# Output says whose it is, but for the first process's; arguments arrive as they are.
run_launch 2 /bin/sh -c 'sleep 0.$RANK; echo "$1"; echo error >&2' sh 'two  words'
expect "output" "$(sort <<<"$output")" "$(printf '%s\n' '[1] error' '[1] two  words' 'error' 'two  words' | sort)"

# The first failure is the result, and ends the others. One that does not listen is ended by force.
run_launch 3 /bin/sh -c 'if [ "$RANK" = 1 ]; then exit 7; fi; trap "echo asked to end; exit 3" TERM; sleep 60 & wait'
expect "exit code of failure" "$code" 7
expect "the others were asked to end" "$(grep -c 'asked to end' <<<"$output")" 2
expect "who failed" "$(grep -c 'process 1 ended with code 7' <<<"$output")" 1
expect "the others do not go on" "$((seconds < 30))" 1
run_launch 2 /bin/sh -c 'if [ "$RANK" = 0 ]; then kill -9 $$; fi; trap "" TERM; while :; do sleep 1; done'
expect "exit code of a killed process" "$code" 137
expect "one that does not listen is ended" "$((seconds < 30))" 1

# Ctrl-C reaches each process once, and what they then return is the result.
set -m # otherwise a job in the background ignores it
"$launch" 2 /bin/sh -c 'trap "echo interrupted >>\"$0/interrupted$RANK\"" INT
  touch "$0/ready$RANK"; while [ ! -s "$0/interrupted$RANK" ]; do sleep 0.1; done; sleep 0.5; exit 130' "$folder" &
job=$!
set +m
while [[ ! -e $folder/ready0 || ! -e $folder/ready1 ]]; do sleep 0.1; done
kill -s INT -- "-$job"
code=0
wait "$job" || code=$?
expect "exit code after Ctrl-C" "$code" 130
for rank in 0 1; do expect "process $rank was interrupted" "$(cat "$folder/interrupted$rank")" interrupted; done

run_launch two /bin/sh
expect "exit code of a wrong number" "$code" 2
run_launch 2
expect "exit code without a program" "$code" 2

exit "$((failures > 0))"
