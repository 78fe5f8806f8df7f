# Tine's warm interpreter for Python. The agent starts it with requests on fd 3
# and replies on fd 4, one JSON object a line; see docs/formats/interpreter.md.
import ast
import json
import os
import sys
from _signal import SIGINT, SIGUSR2, signal  # the module around it is slow: it deals in enums
from _thread import start_new_thread
import traceback

REQUESTS, REPLIES = 3, 4
FILENAME = "<tine>"
MAX_VALUE = 1 << 20

for fd in (REQUESTS, REPLIES):
    os.set_inheritable(fd, False)


class State:
    """What the loop keeps between requests."""

    def __init__(self):
        import types

        module = types.ModuleType("__main__")
        module.__dict__["__builtins__"] = __builtins__
        sys.modules["__main__"] = module
        self.namespace = module.__dict__
        self.count = 0


def send(line):
    # The newline before ends what user code may have written to the descriptor.
    data = ("\n" + line + "\n").encode("utf-8", "surrogatepass")
    view = memoryview(data)
    while view:
        view = view[os.write(REPLIES, view):]


def lines():
    """Yields the lines of fd 3."""
    buffer = bytearray()
    while True:
        chunk = os.read(REQUESTS, 65536)
        if not chunk:
            return
        buffer += chunk
        while True:
            end = buffer.find(b"\n")
            if end < 0:
                break
            line = bytes(buffer[:end])
            del buffer[:end + 1]
            yield line


def remember_source(filename, code):
    """Lets tracebacks quote lines of code that is in no file."""
    import linecache

    linecache.cache[filename] = (len(code), None, code.splitlines(True), filename)


def evaluate(state, code):
    """Runs code as a notebook does; returns the last expression's value."""
    state.count += 1
    filename = "<tine-%d>" % state.count
    remember_source(filename, code)
    tree = ast.parse(code, filename)
    last = None
    if tree.body and isinstance(tree.body[-1], ast.Expr):
        last = ast.Expression(tree.body.pop().value)
    exec(compile(tree, filename, "exec"), state.namespace)
    if last is None:
        return None
    value = eval(compile(last, filename, "eval"), state.namespace)
    if value is not None:
        state.namespace["_"] = value
    return value


def describe(value):
    """The value as text, and as JSON where it can be that: fields of a reply,
    written by hand, as a fork pays for every line that it runs first."""
    if value is None:
        return '"value": null'
    fields = '"value": ' + json.dumps(repr(value)[:MAX_VALUE])
    try:
        encoded = json.dumps(value, allow_nan=False)
        if len(encoded) <= MAX_VALUE:
            fields += ', "value_json": ' + encoded
    except (TypeError, ValueError, RecursionError, OverflowError):
        pass
    return fields


def error_of(exc):
    """The exception, with the user's own frames only."""
    tb = exc.__traceback__
    while tb is not None and tb.tb_frame.f_code.co_filename == __file__:
        tb = tb.tb_next
    try:
        lines = traceback.format_exception(type(exc), exc, tb)
        message = str(exc)
    except BaseException as other:
        lines, message = [repr(other)], "<unprintable>"
    return {
        "type": type(exc).__name__,
        "message": message[:MAX_VALUE],
        "traceback": "".join(lines)[-MAX_VALUE:],
    }


def flush():
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BaseException:
            pass


def answer(state, request):
    """The reply line to a request."""
    try:
        fields = describe(evaluate(state, request["code"]))
        return '{"id": %d, %s, "error": null}' % (request["id"], fields)
    except BaseException as exc:
        return failure(request, exc)


def failure(request, exc):
    return json.dumps({"id": request.get("id"), "value": None, "error": error_of(exc)})


def forked():
    """Makes sure that no generator goes on where the parent's stood."""
    reseed()
    if "numpy.random" in sys.modules:
        reseed_numpy()


def reseed():
    """All but numpy, whose generators have locks."""
    seed = os.urandom(32)
    if "random" in sys.modules:
        sys.modules["random"].seed(int.from_bytes(seed, "little"))
    if "ssl" in sys.modules:
        sys.modules["ssl"].RAND_add(seed, 32.0)
    if "uuid" in sys.modules:
        uuid = sys.modules["uuid"]
        uuid._node = None
        uuid._last_timestamp = None
    if "tempfile" in sys.modules:
        sys.modules["tempfile"]._name_sequence = None


def reseed_numpy(wait=True):
    """Numpy's legacy generator, and those that the namespace holds: there is no
    list of all others. Returns whether all are done: without wait, those whose
    lock is held are not, as it may be the interrupted code that holds it."""
    random = sys.modules["numpy.random"]
    done = wait or is_free(random.mtrand._rand._bit_generator.lock)
    if done:
        random.seed(list(memoryview(os.urandom(32)).cast("I")))
    kind = getattr(random, "Generator", ())
    for value in list(sys.modules["__main__"].__dict__.values()):
        if not issubclass(type(value), kind) or is_seeded(value.bit_generator):
            continue
        bits = value.bit_generator
        state = type(bits)().state
        if not bits.lock.acquire(wait):
            done = False
            continue
        try:
            bits.state = state
        finally:
            bits.lock.release()
    return done


def is_seeded(bits):
    """Whether a generator has a seed of the user's own, and is meant to repeat
    itself. Numpy takes 128 bits from the system where it is given none."""
    sequence = getattr(bits, "seed_seq", None) or getattr(bits, "_seed_seq", None)
    entropy = getattr(sequence, "entropy", None)
    return isinstance(entropy, int) and entropy >> 64 == 0


def is_free(lock):
    free = lock.acquire(False)
    if free:
        lock.release()
    return free


def cloned(signum, frame):
    """The machine is a clone, as forked says, but code runs: this comes between
    two of its instructions."""
    try:
        reseed()
        if "numpy.random" not in sys.modules or reseed_numpy(False):
            return
    except KeyboardInterrupt:  # the code's own
        start_new_thread(quietly, ())
        raise
    except Exception:
        pass  # it is not the code's concern
    start_new_thread(quietly, ())  # which has a stack of its own, and can wait


def quietly():
    try:
        forked()
    except BaseException:
        pass  # forked comes again, before the next request


def interrupt(signum, frame):
    raise KeyboardInterrupt


def idle(signum, frame):
    pass


def main():
    sys.argv = [""]
    sys.path.insert(0, "")
    state = State()
    signal(SIGINT, idle)
    signal(SIGUSR2, cloned)
    send(json.dumps({"ready": True, "language": "python", "version": sys.version.split()[0]}))
    for line in lines():
        if line.startswith(b'{"id":0,"op":"forked"'):
            forked()
            os.write(REPLIES, b'\n{"id":0,"forked":true}\n')
            continue
        request = json.loads(line)
        try:
            signal(SIGINT, interrupt)
            reply = answer(state, request)
            signal(SIGINT, idle)
        except KeyboardInterrupt as exc:  # it came between the two
            signal(SIGINT, idle)
            reply = failure(request, exc)
        flush()
        send(reply)


main()
