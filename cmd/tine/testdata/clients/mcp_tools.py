"""Drives the tools of forkd-mcp over standard input and output."""

import asyncio
import json
import os
import sys

from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client

TOOLS = {
    "list_snapshots", "create_snapshot", "spawn_sandboxes", "branch_sandbox", "list_sandboxes", "get_sandbox",
    "kill_sandbox", "exec_command", "eval_code", "ping_sandbox", "wait_for_text",
}


def answer(result):
    """What a tool has returned: a list comes as one block for each element."""
    assert not result.isError, result
    values = [json.loads(block.text) for block in result.content]
    return values if len(values) != 1 else values[0]


def many(result):
    """What a tool that returns a list has returned."""
    assert not result.isError, result
    return [json.loads(block.text) for block in result.content]


async def drive(session):
    await session.initialize()
    assert {t.name for t in (await session.list_tools()).tools} == TOOLS

    async def call(tool, **arguments):
        return await session.call_tool(tool, arguments)

    assert "py" in {s["tag"] for s in many(await call("list_snapshots"))}
    boxes = many(await call("spawn_sandboxes", snapshot_tag="py", n=2))
    assert len(boxes) == 2 and all(b["memory_limit_mib"] == 256 for b in boxes), boxes
    src = boxes[0]["id"]
    assert {b["id"] for b in many(await call("list_sandboxes"))} == {b["id"] for b in boxes}
    assert answer(await call("get_sandbox", sandbox_id=src))["id"] == src
    assert answer(await call("ping_sandbox", sandbox_id=src))["pong"] is True
    result = answer(await call("exec_command", sandbox_id=src, args=["sh", "-c", "echo ready >/tmp/log"]))
    assert result["exit_code"] == 0, result
    assert answer(await call("eval_code", sandbox_id=src, code="1+1"))["result"] == "2"
    found = answer(await call("wait_for_text", sandbox_id=src, path="/tmp/log", marker="ready"))
    assert found["found"] is True, found
    for options in {"tag": "mcp-full"}, {"tag": "mcp-live", "mode": "live"}, {"tag": "mcp-diff", "diff": True}:
        branch = answer(await call("branch_sandbox", sandbox_id=src, **options))
        assert branch["tag"] == options["tag"] and branch["status"] == "ready", branch
    # A snapshot of files of the daemon's host, and a fork of it.
    files = {"kernel": os.environ["FORKD_KERNEL"], "rootfs": os.environ["FORKD_ROOTFS"]}
    refused = await call("create_snapshot", **{"tag": "mcp-made", **files, "kernel": "/none"})
    assert refused.isError and "400" in refused.content[0].text, refused
    snap = answer(await call("create_snapshot", tag="mcp-made", **files))
    assert snap["status"] == "ready" and snap["bootable"] is True and "kernel" in snap["warning"], snap
    assert (snap["memory_mib"], snap["vcpus"]) == (512, 2), snap
    refused = await call("create_snapshot", tag="mcp-made", **files)
    assert refused.isError and "400" in refused.content[0].text, refused
    (made,) = many(await call("spawn_sandboxes", snapshot_tag="mcp-made"))
    boxes.append(made)
    script = "read -r line </etc/made; echo $line; echo more >>/etc/made; read -r line </twin; echo $line"
    result = answer(await call("exec_command", sandbox_id=made["id"], args=["/bin/sh", "-c", script]))
    assert (result["stdout"], result["exit_code"]) == ("as a file\nas a file\n", 0), result
    for box in boxes:
        assert answer(await call("kill_sandbox", sandbox_id=box["id"]))["killed"] is True
    assert many(await call("list_sandboxes")) == []


async def main():
    server = StdioServerParameters(command=os.path.join(os.path.dirname(sys.executable), "forkd-mcp"), env=dict(os.environ))
    async with stdio_client(server) as (read, write), ClientSession(read, write) as session:
        await drive(session)


asyncio.run(main())
