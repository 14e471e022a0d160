"""The steps that bring a server of the cluster up, whoever asks for them: `make up`, `make site-up` and `make site-join`."""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Callable, Iterator, Sequence

from tools import images
from tools.cluster import debian, host, kubernetes, network, preflight, registry, sources
from tools.cluster.kubernetes import Server
from tools.cluster.settings import Settings
from tools.errors import OperatorError
from tools.layout import Layout
from tools.progress import Runner, Step

Say = Callable[[str], None]
CONTROL_PLANE = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kube-proxy")


class Steps:
    """What the steps of one server share and hand each other."""

    def __init__(self, layout: Layout, settings: Settings, server: Server) -> None:
        self.layout, self.settings, self.server = layout, settings, server
        self.began = time.time()
        self.builder: images.Builder | None = None
        self.digests: dict[str, str] = {}
        self.repository = kubernetes.images(settings)
        """Of the images that kubeadm names."""

    def _sources(self, wanted: Sequence[sources.Source]) -> list[Step]:
        """Programs from source, one after another: a compiler uses all cores."""
        return [Step(_built(s), self._source(s), s.expected, after=(_built(wanted[i - 1]),) if i else ()) for i, s in enumerate(wanted)]

    def _source(self, source: sources.Source) -> Callable[[Say], bool]:
        return lambda say: sources.build(source, self.layout, say)

    def _image(self, name: str, expected: float, after: str) -> Step:
        return Step(f"{name} image", lambda say: self._builder().build(images.IMAGES[name], say), expected, after=(after,))

    def _builder(self) -> images.Builder:
        if self.builder is None:
            self.builder = images.Builder(self.layout)
        return self.builder

    def packages(self, say: Say) -> bool:
        return debian.unpack(self.layout, say)

    def services(self, say: Say) -> bool:
        """The first server's address, registry and container runtime."""
        network.up(self.layout, self.settings)
        (self.layout.runtime / "buildah").mkdir(parents=True, exist_ok=True)
        network.pod_network(self.layout, self.settings, network.first_pods(self.settings))
        return any([registry.registry(self.layout, self.settings).start(self.layout),
                    kubernetes.containerd(self.layout, self.settings).start(self.layout)])

    def named_images(self) -> list[tuple[str, str, str]]:
        """(image, name in the registry, tag) of what Kubernetes itself runs, under the names that kubeadm expects."""
        s = self.settings
        return [*(("kubernetes", name, s.kubernetes_version) for name in CONTROL_PLANE), ("kubernetes", "etcd", s.etcd_version),
                ("coredns", "coredns", s.coredns_version), ("pause", "pause", "1")]

    def node_images(self, say: Say) -> bool:
        """Build them, push them to the registry and bring them into containerd."""
        changed = False
        for image, name, tag in self.named_images():
            say(name)
            for part in images.with_bases([image]):
                changed |= self._builder().build(part, say)
            digest = self._builder().push(images.IMAGES[image], self.repository, tag, say, local=True, name=name)
            self.digests[name] = digest
            changed |= kubernetes.pull(self.layout, f"{self.repository}/{name}:{tag}", digest, self.layout.logs / f"image-{image}.log")
        return changed

    def kubernetes(self, say: Say) -> bool:
        return kubernetes.up(self.layout, self.settings, self.server, say)


def _built(source: sources.Source) -> str:
    """Name of the step that builds a source."""
    return f"{source.name} from source"


@contextlib.contextmanager
def only_one(layout: Layout) -> Iterator[None]:
    """Hold the lock of this machine's server, so that two `make up` or a `make down` beside it do not meet half-way."""
    with open(layout.state / preflight.MARK) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OperatorError("Another `make up` is at work on this machine; wait for it, or end it first.") from None
        yield


def run(layout: Layout, steps: Sequence[Step]) -> None:
    """Mark this machine as ours and run steps, with progress, two at once."""
    layout.state.mkdir(parents=True, exist_ok=True)
    (layout.state / preflight.MARK).write_text("`make down` removes this folder.\n")
    with only_one(layout):
        host.record(layout)
        Runner(layout.cache / "timings.json").run(steps, at_once=2)
