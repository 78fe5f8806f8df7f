"""Drives every method of forkd's Controller against a running daemon.

FORKD_URL and, where the daemon wants one, FORKD_TOKEN say where it is. Every
claim is an assertion: the script ends with 0 or with a traceback.
"""

import time

from forkd import Controller, ControllerError

c = Controller()


def refused(status, call, *args, **kwargs):
    """What the daemon answers to a call that it must refuse."""
    try:
        call(*args, **kwargs)
    except ControllerError as e:
        assert e.status == status, (e.status, e.body, status)
        assert isinstance(e.body, dict) and e.body["error"] and e.body["code"], e.body
        return e.body
    raise AssertionError(f"{call.__name__} {args} {kwargs} was not refused")


def snapshot(tag):
    """The only entry of a tag in the list."""
    found = [s for s in c.list_snapshots() if s["tag"] == tag]
    assert len(found) == 1, (tag, found)
    return found[0]


def stdout(sandbox_id, *args):
    result = c.exec_command(sandbox_id, list(args))
    assert result["exit_code"] == 0, result
    return result["stdout"]


# Snapshots.
py = snapshot("py")
assert py["status"] == "ready" and py["bootable"] is True, py
assert py["dir"] and py["created_at_unix"] > 0, py

# Sandboxes.
assert c.list_sandboxes() == []
one, two = c.spawn_sandboxes("py", n=2)
(three,) = c.spawn_sandboxes("py", memory_limit_mib=256, prewarm=True, live_fork=True, hugepages=True)
for box in one, two, three:
    fields = {
        "id", "snapshot_tag", "netns", "guest_addr", "created_at_unix", "pid",
        "memory_limit_mib", "has_branched", "last_branch_memory_path", "branch_count",
    }
    assert fields <= box.keys(), fields - box.keys()
    assert box["snapshot_tag"] == "py" and box["pid"] > 1 and box["has_branched"] is False, box
assert three["memory_limit_mib"] == 256 and one["memory_limit_mib"] is None
assert len({b["id"] for b in (one, two, three)}) == 3
assert {b["id"] for b in c.list_sandboxes()} == {b["id"] for b in (one, two, three)}
assert c.get_sandbox(one["id"])["pid"] == one["pid"]
refused(404, c.spawn_sandboxes, "none")
refused(400, c.spawn_sandboxes, "py", n=0)
refused(400, c.spawn_sandboxes, "../py")
refused(404, c.get_sandbox, "none")
assert c.kill_sandbox(three["id"]) is None
refused(404, c.get_sandbox, three["id"])
refused(404, c.kill_sandbox, three["id"])

# Commands and code.
src = one["id"]
result = c.exec_command(src, ["sh", "-c", "echo out; echo err >&2; exit 3"])
assert (result["stdout"], result["stderr"], result["exit_code"]) == ("out\n", "err\n", 3), result
assert c.exec_command(src, ["sh", "-c", "kill -9 $$"])["exit_code"] == -9
late = c.exec_command(src, ["sleep", "60"], timeout_secs=1)
assert late["exit_code"] != 0 and "timed out" in late["error"], late
missing = c.exec_command(src, ["no-such-command"])
assert missing["exit_code"] != 0 and missing["error"], missing
refused(400, c.exec_command, src, [])
refused(404, c.exec_command, "none", ["true"])
value = c.eval_code(src, "1+1")
assert (value["result"], value["error"], value["exit_code"]) == ("2", None, 0), value
wrong = c.eval_code(src, "1/0")
assert wrong["exit_code"] == 1 and "ZeroDivisionError" in wrong["error"], wrong
assert c.ping_sandbox(src)["pong"] is True
assert c.ping_sandbox(two["id"])["pong"] is True
refused(404, c.ping_sandbox, "none")

# Branches: each mode, and what a fork of each has of its source.
made = []
for step, options in enumerate((
    {},
    {"tag": "b-diff", "diff": True},
    {"tag": "b-measured", "measure_diff": True},
    {"tag": "b-mode-full", "mode": "full"},
    {"tag": "b-mode-diff", "mode": "diff"},
    {"tag": "b-live", "mode": "live"},
    {"tag": "b-later", "mode": "live", "wait": False},
)):
    stdout(src, "sh", "-c", f"echo {step} >/root/step")
    branch = c.branch_sandbox(src, **options)
    tag = branch["tag"]
    made.append(tag)
    assert tag == options.get("tag", tag) and branch["branched_from"] == src, branch
    assert branch["pause_ms"] >= 0, branch
    if options.get("wait") is False:
        # The only way to wait is the list: it must not say ready too early.
        seen = [branch["status"]]
        deadline = time.monotonic() + 60
        while seen[-1] == "writing" and time.monotonic() < deadline:
            seen.append(snapshot(tag)["status"])
            time.sleep(0.05)
        assert seen[0] == "writing" and seen[-1] == "ready", seen
    else:
        assert branch["status"] == "ready" and branch["bootable"] is True, branch
    if options.get("diff") or options.get("measure_diff"):
        assert branch["diff_physical_bytes"] > 0 and branch["diff_logical_bytes"] > 0, branch
    assert snapshot(tag)["status"] == "ready"
    (fork,) = c.spawn_sandboxes(tag)
    assert stdout(fork["id"], "cat", "/root/step") == f"{step}\n"
    c.kill_sandbox(fork["id"])
after = c.get_sandbox(src)
assert after["has_branched"] is True and after["branch_count"] == len(made), after
assert after["last_branch_memory_path"], after
assert stdout(src, "cat", "/root/step") == "6\n"
refused(400, c.branch_sandbox, src, tag="b-no", mode="diff", wait=False)
refused(400, c.branch_sandbox, src, tag="../no")
refused(409, c.branch_sandbox, src, tag="b-live")
refused(404, c.branch_sandbox, "none", tag="b-no")

# The end.
for box in one, two:
    c.kill_sandbox(box["id"])
assert c.list_sandboxes() == []
refused(404, c.delete_snapshot, "none")
for tag in reversed(made):
    assert c.delete_snapshot(tag) is None
assert {s["tag"] for s in c.list_snapshots()} & set(made) == set()
