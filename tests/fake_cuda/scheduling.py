"""The order in which the fake accelerator executes what streams and host threads ask for."""

import threading

from tests.fake_cuda.streams import FakeEvent, FakeStream, Line, Node


class Scheduling:
    """Advances the vector clocks of streams and host threads, and defers work at random."""

    def new_number(self) -> int:
        self._numbers += 1
        return self._numbers

    def host(self) -> Line:
        """Return the line of the current host thread."""
        if not hasattr(self._local, "host"):
            with self.lock:
                self._local.host = Line(f"host thread {threading.current_thread().name}", self.new_number())
                self._local.host.tick()
        return self._local.host

    def launch(self, stream: FakeStream) -> None:
        """Order what the host has seen before what it now asks a stream to do, not vice versa."""
        host = self.host()
        stream.learn(host.clock)
        stream.tick()
        host.tick()

    def wait(self, stream: FakeStream, event: FakeEvent) -> None:
        with self.lock:
            self.launch(stream)
            stream.learn(event.clock)
            if event.node is None or event.node.done:
                return
            if stream is self._default:
                self.run(event.node)
                return
            for node in self._before(event.node):
                for part in node.parts:
                    if part.record.stream is stream:
                        part.keep()
            self.after(stream, None, [event.node])

    def after(self, stream: FakeStream, action, deps=()) -> Node | None:
        """Run an action in the stream's order: now if nothing is deferred."""
        if stream.queue or deps:
            node = Node(stream, action, list(deps))
            stream.queue.append(node)
            return node
        if action:
            action()
        return None

    def run(self, node: Node | None) -> None:
        """Run what is deferred up to `node`."""
        while node is not None and not node.done:
            head = node.stream.queue[0]
            for dep in head.deps:
                self.run(dep)
            if not head.done:
                node.stream.queue.popleft()
                head.done = True
                if head.action:
                    head.action()

    def _before(self, node: Node):
        """Yield the unfinished nodes that `node` waits for, and itself."""
        for other in node.stream.queue:
            yield other
            for dep in other.deps:
                if not dep.done:
                    yield from self._before(dep)
            if other is node:
                return

    def _pump(self) -> None:
        """Run something that is deferred, at random."""
        if self._random.random() < self._chance:
            ready = [s for s in self.streams if s.queue and all(dep.done for dep in s.queue[0].deps)]
            if ready:
                self.run(self._random.choice(ready).queue[0])
