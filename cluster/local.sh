#!/usr/bin/env bash
# A real Ray cluster of several nodes on this machine: N times `ray start`, one CPU each, token authentication.
#
#   bash cluster/local.sh up [N]        start N nodes (default 2)
#   bash cluster/local.sh status        what runs
#   bash cluster/local.sh submit ARGS   `ray job submit` to it; ARGS as for ray, e.g.
#        bash cluster/local.sh submit --working-dir . --runtime-env launch/runtime_env.yaml \
#            -- python -m qbrec run --config launch/jobs/local.yaml
#   bash cluster/local.sh env           print the exports with which any ray command reaches it:  eval "$(… env)"
#   bash cluster/local.sh kill I        kill -9 node I (0 is the head), as a crashed machine would
#   bash cluster/local.sh down          stop what `up` started, and nothing else
#
# Settings: QBREC_CLUSTER_DIR (state, logs, token; keep it short, sockets lie below it), QBREC_CLUSTER_PORT (first of
# the ports used; 10 and 10 more per node), QBREC_CLUSTER_CPUS (per node).
set -euo pipefail

DIR="${QBREC_CLUSTER_DIR:-/tmp/qbrec-cluster-$(id -u)}"
PORT="${QBREC_CLUSTER_PORT:-26400}"
CPUS="${QBREC_CLUSTER_CPUS:-1}"
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${QBREC_VENV:-$ROOT/.venv}"
if [[ -x "$VENV/bin/ray" ]]; then export PATH="$VENV/bin:$PATH"; fi

fail() {
    echo "error: $1" >&2
    [[ -z "${2:-}" ]] || echo "  fix: $2" >&2
    exit "${3:-5}"
}

reach() { # the variables with which a process finds this cluster and is let in
    [[ ! -f "$DIR/port" ]] || PORT="$(cat "$DIR/port")"
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$DIR/token"
    export RAY_ADDRESS="127.0.0.1:$PORT" RAY_API_SERVER_ADDRESS="http://127.0.0.1:$((PORT + 1))"
}

alive() { # is the process of file $1 still the one we started?  (process ids are reused: compare its start time)
    local pid started
    read -r pid started <"$1" && [[ "$(start_time "$pid")" == "$started" ]]
}

start_time() { # field 22 of /proc/PID/stat, nothing for a zombie; field 2 may hold blanks, so cut behind its bracket
    sed -n 's/.*) //p' "/proc/$1/stat" 2>/dev/null | awk '$1 != "Z" {print $20}'
}

members() { # process ids, zombies left out, of the session that process $1 leads and of what descends from it
    # (Ray starts the driver of a job in a session of its own)
    ps -e -o pid=,ppid=,sid=,stat= | awk -v leader="$1" '
        $4 ~ /^Z/ { next }
        { parent[$1] = $2; if ($3 == leader) in_node[$1] = 1 }
        END {
            do {
                grown = 0
                for (p in parent) if (!(p in in_node) && parent[p] in in_node) { in_node[p] = 1; grown = 1 }
            } while (grown)
            for (p in in_node) print p
        }'
}

same() { # those of the "process id, start time" lines on stdin that still run
    local pid started
    while read -r pid started; do
        [[ -z "$pid" || "$(start_time "$pid")" != "$started" ]] || echo "$pid"
    done
}

start_node() { # start_node I: node I in a process session of its own, so that it can be stopped as a whole
    local i="$1" base=$((PORT + 10 * ($1 + 1))) where pid
    if ((i == 0)); then
        where=(--head --port "$PORT" --include-dashboard true --dashboard-host 127.0.0.1 --dashboard-port $((PORT + 1))
            --ray-client-server-port $((PORT + 2)))
    else
        where=(--address "127.0.0.1:$PORT" --include-log-monitor false)
    fi
    mkdir -p "$DIR/n$i"
    setsid ray start "${where[@]}" --block --disable-usage-stats --node-ip-address 127.0.0.1 --num-cpus "$CPUS" \
        --object-store-memory 300000000 --temp-dir "$DIR/n$i" \
        --node-manager-port "$base" --object-manager-port $((base + 1)) --dashboard-agent-listen-port $((base + 2)) \
        --dashboard-agent-grpc-port $((base + 3)) --runtime-env-agent-port $((base + 4)) \
        --metrics-export-port $((base + 5)) </dev/null >"$DIR/n$i.log" 2>&1 &
    pid=$!
    echo "$pid $(start_time "$pid")" >"$DIR/n$i.pid"
}

up() {
    local count="${1:-2}" i deadline
    [[ "$count" =~ ^[1-9][0-9]*$ ]] || fail "number of nodes $count" "bash cluster/local.sh up 2" 2
    command -v ray >/dev/null || fail "ray is not on PATH" "bash launch/test.sh makes .venv; or activate the environment that has qbrec"
    for file in "$DIR"/n*.pid; do
        [[ ! -f "$file" ]] || ! alive "$file" || fail "a cluster already runs (state in $DIR)" "bash cluster/local.sh down"
    done
    mkdir -p "$DIR" && chmod 700 "$DIR"
    rm -rf "$DIR"/n*
    echo "$PORT" >"$DIR/port"
    (umask 077 && od -An -tx1 -N32 /dev/urandom | tr -d ' \n' >"$DIR/token")
    reach
    unset RAY_ADDRESS # `ray start` would try to join it
    for ((i = 0; i < count; i++)); do
        start_node "$i"
        deadline=$((SECONDS + 120))
        # ray prints this line once the head has registered the node
        until grep -q "Ray runtime started" "$DIR/n$i.log"; do
            if ! alive "$DIR/n$i.pid" || ((SECONDS > deadline)); then
                tail -n 20 "$DIR/n$i.log" >&2
                down
                fail "node $i did not come up" "read the log above; is port $PORT taken? set QBREC_CLUSTER_PORT"
            fi
            sleep 0.5
        done
        echo "node $i is up"
    done
    # `ray status` shows the cluster as it was some seconds ago: what is asked next shall see all of it.
    deadline=$((SECONDS + 60))
    until ray status --address "127.0.0.1:$PORT" 2>/dev/null | grep -q "/$((count * CPUS)).0 CPU"; do
        ((SECONDS < deadline)) || fail "the head does not report all $count nodes" "bash cluster/local.sh status"
        sleep 1
    done
    echo "dashboard: $RAY_API_SERVER_ADDRESS (token in $DIR/token)"
}

processes() { # processes FILE: "process id, start time" of all that the node consists of
    local leader pid started
    read -r leader _ <"$1"
    for pid in $(members "$leader"); do
        started="$(start_time "$pid" || true)"
        [[ -z "$started" ]] || echo "$pid $started"
    done
}

signal() { # signal NAME: to the process ids on stdin; some may be gone by now
    xargs -r kill "-$1" 2>/dev/null || true
}

down() {
    local file i known
    # Workers first, so that the head sees them leave.
    for file in $(ls -r "$DIR"/n*.pid 2>/dev/null); do
        if alive "$file"; then
            # Listed before anything dies: whose parent is gone is not to be found any more.
            known="$(processes "$file")"
            same <<<"$known" | signal TERM
            for ((i = 0; i < 20; i++)); do
                [[ -n "$(same <<<"$known")" ]] || break
                sleep 0.5
            done
            known+=$'\n'"$(processes "$file")" # what started meanwhile
            for ((i = 0; i < 20; i++)); do
                [[ -n "$(same <<<"$known")" ]] || break
                same <<<"$known" | signal KILL
                sleep 0.1
            done
        fi
        rm -f "$file"
        echo "node $(basename "$file" .pid | tr -d n) is down"
    done
    rm -f "$DIR/token" "$DIR/port"
}

case "${1:-}" in
    up) up "${2:-}" ;;
    down) down ;;
    status)
        reach
        for file in "$DIR"/n*.pid; do
            [[ -f "$file" ]] || fail "no cluster runs (state would be in $DIR)" "bash cluster/local.sh up 2"
            name="$(basename "$file" .pid)"
            if alive "$file"; then echo "$name: running, process $(cut -d' ' -f1 "$file")"; else echo "$name: gone"; fi
        done
        ray status --address "$RAY_ADDRESS"
        ;;
    submit)
        shift
        [[ -f "$DIR/token" ]] || fail "no cluster runs (state would be in $DIR)" "bash cluster/local.sh up 2"
        reach
        unset RAY_ADDRESS # `ray job submit` would take it for the address of the dashboard
        exec ray job submit --address "$RAY_API_SERVER_ADDRESS" "$@"
        ;;
    env)
        [[ -f "$DIR/token" ]] || fail "no cluster runs (state would be in $DIR)" "bash cluster/local.sh up 2"
        reach
        for name in RAY_AUTH_MODE RAY_AUTH_TOKEN_PATH RAY_ADDRESS RAY_API_SERVER_ADDRESS; do
            printf 'export %s=%q\n' "$name" "${!name}"
        done
        ;;
    kill)
        file="$DIR/n${2:-}.pid"
        [[ -f "$file" ]] && alive "$file" || fail "node ${2:-(none named)} does not run" "bash cluster/local.sh status" 2
        processes "$file" | same | signal KILL
        ;;
    *)
        sed -n '2,/^set -/p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//'
        exit 2
        ;;
esac
