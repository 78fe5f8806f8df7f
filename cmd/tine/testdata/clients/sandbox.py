"""Drives forkd's Sandbox class, which starts the program forkd and talks to
the address in FORKD_TARGET."""

from forkd import Sandbox

with Sandbox(tag="py") as sb:
    result = sb.commands.run("echo out; echo err >&2; exit 3")
    assert (result.stdout, result.stderr, result.exit_code) == ("out\n", "err\n", 3), result
    assert sb.commands.run(["python3", "-c", "print(6*7)"]).stdout == "42\n"
    late = sb.commands.run("sleep 60", timeout=1)
    assert late.exit_code == 1 and "timed out" in late.stderr, late
    missing = sb.commands.run(["no-such-command"])
    assert missing.exit_code == 1 and missing.stderr, missing
    assert sb.eval("1+1") == "2"
    try:
        sb.eval("1/0")
    except RuntimeError as e:
        assert "ZeroDivisionError" in str(e), e
    else:
        raise AssertionError("no error")
    pong = sb.ping()
    assert pong["pong"] is True and pong["agent_lang"] == "python", pong
    assert pong["numpy_version"] == "not-installed", pong

second = Sandbox.create(tag="py")
assert second.commands.run("hostname").exit_code == 0
second.kill()

try:
    Sandbox(tag="none")
except RuntimeError as e:
    assert "none" in str(e), e
else:
    raise AssertionError("a snapshot that is not there was forked")
