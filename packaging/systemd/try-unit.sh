#!/bin/sh
# Starts the daemon the way tine.service says, without systemd: a user of its
# own, no capability, no new privileges, the unit's environment. Then a sandbox
# is forked, the daemon is killed with kill -9 and started again, and the sandbox
# has to be there. Run it as root:
#
#   packaging/systemd/try-unit.sh PROGRAM-DIR STATE-DIR [live]
#
# With live it has the capabilities of live-branches.conf.
# PROGRAM-DIR has tine and tine-agent; of STATE-DIR the images and the snapshot
# py are copied.
set -eu
programs=$1 from=$2
caps=-all
[ "${3-}" != live ] || caps=-all,+sys_admin,+sys_ptrace
unit=$(dirname "$0")/tine.service
uid=64321
dir=$(mktemp -d /var/tmp/tine-unit.XXXX)
daemon=
machine=
cleanup() {
	for pid in $daemon $machine; do kill "$pid" 2>/dev/null || true; done
	rm -rf "$dir"
}
trap cleanup EXIT

# What the script relies on the unit to say.
for line in CapabilityBoundingSet= AmbientCapabilities= NoNewPrivileges=yes UMask=0077 StateDirectoryMode=0700 KillMode=process; do
	grep -qx "$line" "$unit" || { echo "the unit does not say $line"; exit 1; }
done
grep -qx 'ExecStart=/usr/local/lib/tine/tine serve $TINE_OPTS' "$unit"

chmod 0755 "$dir"
mkdir -m 0755 "$dir/lib"
cp "$programs/tine" "$programs/tine-agent" "$dir/lib"
mkdir -m 0700 "$dir/state"
cp -a --sparse=always "$from/images" "$from/snapshots" "$dir/state"
chown -R $uid:$uid "$dir/state"

as_tine() {
	exec setpriv --reuid $uid --regid $uid --clear-groups --no-new-privs --bounding-set=$caps --inh-caps=$caps --ambient-caps=$caps \
		env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin TINE_STATE_DIR="$dir/state" "$@"
}
start() {
	umask 0077
	as_tine "$dir/lib/tine" serve --listen '' >>"$dir/log" 2>&1 &
	daemon=$!
	for _ in $(seq 100); do
		if tine ls >/dev/null 2>&1; then return; fi
		sleep 0.1
	done
	cat "$dir/log"
	exit 1
}
tine() ( as_tine "$dir/lib/tine" "$@" )

start
echo "daemon: $(grep -E '^(Uid|NoNewPrivs|CapEff|CapBnd)' /proc/$daemon/status | tr -s '\t\n' '  ')"
id=$(tine fork --snapshot py --json | sed -n 's/.*"id": *"\(sb-[a-z0-9]*\)".*/\1/p' | head -1)
machine=$(pgrep -f "tine-$id" | head -1)
echo "machine: $(grep -E '^(Uid|NoNewPrivs|Seccomp|CapEff)' /proc/$machine/status | tr -s '\t\n' '  ')"
tine exec "$id" -- sh -c 'echo kept > /root/at; hostname'
tine branch "$id" --tag live --mode live
kill -9 "$daemon"
wait "$daemon" || true
! kill -0 "$daemon" 2>/dev/null
start
test "$(tine exec "$id" -- cat /root/at)" = kept
echo "after kill -9: $id is there"
kill -TERM "$daemon"
wait "$daemon"
kill -0 "$machine"
echo "after SIGTERM: its machine runs on"
start
tine rm --all
kill -TERM "$daemon"
wait "$daemon"
daemon=
! pgrep -f "tine-$id" >/dev/null
echo ok
