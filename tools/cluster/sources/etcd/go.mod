// etcd's server alone: its released module carries etcdctl, etcdutl and the tests too.
module llm-finetune/sources/etcd

go 1.26.0

require go.etcd.io/etcd/server/v3 v3.6.8
