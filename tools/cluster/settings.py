"""Addresses, names and versions of the cluster."""

from __future__ import annotations

import os
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Settings:
    """Networks are chosen not to meet what a host usually has; LLM_FINETUNE_OCTET moves all three."""

    name: str = "llm-finetune"
    """Of the cluster, its node and its links (shortened)."""
    octet: int = field(default_factory=lambda: int(os.environ.get("LLM_FINETUNE_OCTET", "77")))
    """10.<octet>.0.0/24 is the node, 10.<octet+1>.0.0/16 the pods, 10.<octet+2>.0.0/16 the services."""
    link: str = "llmft0"
    """Bridge device that carries the node's address, where the cluster has one server."""
    server: str = ""
    """Address of the cluster's first server, on a network card of its own; empty: our bridge's."""
    server_network: str = ""
    """Network of the servers, where `server` is set."""
    kubernetes_version: str = "v1.36.3"
    etcd_version: str = "v3.6.8"
    coredns_version: str = "v1.14.6"
    helm_version: str = "v4.3.1"
    argocd_version: str = "v3.2.6"
    kuberay_version: str = "v1.6.2"
    flannel_version: str = "v0.28.10"
    registry_port: int = 5000
    git_port: int = 9418
    api_port: int = 6443
    dashboard_port: int = 30265
    """Ray dashboard: NodePort in the cluster, and port on localhost."""
    chatbot_node_port: int = 30786
    chatbot_port: int = 7860
    """Chatbot's port on localhost."""

    @property
    def address(self) -> str:
        """Of the first server: API server, registry and git listen here."""
        return self.server or f"10.{self.octet}.0.1"

    @property
    def node_network(self) -> str:
        return self.server_network or f"10.{self.octet}.0.0/24"

    @property
    def pod_network(self) -> str:
        return f"10.{self.octet + 1}.0.0/16"

    @property
    def service_network(self) -> str:
        return f"10.{self.octet + 2}.0.0/16"

    @property
    def registry(self) -> str:
        return f"{self.address}:{self.registry_port}"

    @property
    def git_url(self) -> str:
        """What Argo CD pulls from."""
        return f"git://{self.address}:{self.git_port}/{self.name}.git"
