// CoreDNS with the plugins that a cluster's Corefile names: the full set links three clouds' SDKs and takes four times as long.
module llm-finetune/sources/coredns

go 1.26.0

require github.com/coredns/coredns v1.14.6
