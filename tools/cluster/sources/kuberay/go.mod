module llm-finetune/sources/kuberay

go 1.26.0

tool (
	github.com/ray-project/kuberay/ray-operator
	github.com/ray-project/kuberay/ray-operator/rayjob-submitter/cmd
)

require github.com/ray-project/kuberay/ray-operator v1.6.2
