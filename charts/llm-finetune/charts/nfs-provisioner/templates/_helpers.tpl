{{- define "nfs-provisioner.labels" -}}{{ include "llm-finetune.labels" (dict "root" . "component" "storage") }}{{- end }}
{{- define "nfs-provisioner.selector" -}}{{ include "llm-finetune.selector" (dict "root" . "component" "storage") }}{{- end }}
{{- define "nfs-provisioner.fullname" -}}{{ include "llm-finetune.fullname" (dict "root" .) }}{{- end }}
{{- define "nfs-provisioner.namespace" -}}{{ .Values.inCluster.namespace | default .Release.Namespace }}{{- end }}

{{/* PersistentVolumes belong to no namespace: the release's is part of the name. */}}
{{- define "nfs-provisioner.volume" -}}{{ printf "%s-%s" .Release.Namespace .Values.global.storage.claimName | trunc 63 | trimSuffix "-" }}{{- end }}

{{/* What would lose data or open it to everybody. */}}
{{- define "nfs-provisioner.check" -}}
{{- $refused := dict
  "soft" "a slow server would become a failed write in the middle of a checkpoint"
  "softerr" "a slow server would become a failed write in the middle of a checkpoint"
  "softreval" "stale names would be served while the server is away"
  "nolock" "two nodes could hold the same lock"
  "local_lock" "two nodes could hold the same lock"
  "async" "an fsync could return before the data is safe"
  "nconnect" "writes of one file could overtake each other on several connections after a reconnect"
  "intr" "it has no effect since Linux 2.6.25"
  "sec" "exports of this chart use sec=sys; a Kerberos mount needs tickets that the pods do not have" -}}
{{- if has .Values.mode (list "external" "inCluster") -}}
{{- range .Values.mountOptions -}}
{{- range splitList "," . -}}
{{- $name := regexFind "^[a-z_]+" . -}}
{{- if hasKey $refused $name -}}
{{- fail (printf "nfs-provisioner.mountOptions has %s: %s. Remove it." . (get $refused $name)) -}}
{{- end -}}
{{- if and (has $name (list "nfsvers" "vers")) (not (has (regexReplaceAll "^[a-z]+=" . "") (list "4.1" "4.2"))) -}}
{{- fail (printf "nfs-provisioner.mountOptions has %s: only 4.1 and later get their locks back after the server restarts. Use nfsvers=4.1." .) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if not (has "hard" .Values.mountOptions) -}}
{{- fail "nfs-provisioner.mountOptions lacks hard: say it, so that no default of a node can make the mount soft. Add hard." -}}
{{- end -}}
{{- end -}}
{{- if eq .Values.mode "external" -}}
{{- if not .Values.external.server -}}
{{- fail "nfs-provisioner.external.server is empty with mode: external. Name the NFS server as the nodes resolve it." -}}
{{- end -}}
{{- if has ".." (splitList "/" .Values.external.path) -}}
{{- fail (printf "nfs-provisioner.external.path is %s: .. leads out of the directory that it seems to name. Write the path without it." .Values.external.path) -}}
{{- end -}}
{{- if eq .Values.external.provisioning "dynamic" -}}
{{- $version := .Values.external.driverVersion -}}
{{- if not $version -}}
{{- fail "nfs-provisioner.external.driverVersion is empty with provisioning: dynamic. Give the version of csi-driver-nfs on the cluster, at least 4.13.4 (kubectl -n kube-system get deployment csi-nfs-controller -o yaml)." -}}
{{- else if not (semverCompare ">=4.13.4" $version) -}}
{{- fail (printf "nfs-provisioner.external.driverVersion is %s: csi-driver-nfs before 4.13.4 lets names with ../ in a volume reach other directories of the export (CVE-2026-3864 and what followed). Update the driver to 4.13.4 or later." $version) -}}
{{- end -}}
{{- end -}}
{{- else if eq .Values.mode "inCluster" -}}
{{- $in := .Values.inCluster -}}
{{- range $key, $what := dict "nodeName" "the node that has the disk" "hostPath" "the directory on its disk" "clusterIP" "a free address of the service range" -}}
{{- if not (get $in $key) -}}
{{- fail (printf "nfs-provisioner.inCluster.%s is empty with mode: inCluster. Give %s." $key $what) -}}
{{- end -}}
{{- end -}}
{{- if not $in.clients -}}
{{- fail "nfs-provisioner.inCluster.clients is empty: nobody could mount the export. Give the nodes' networks, for example [10.0.0.0/24]." -}}
{{- end -}}
{{- range $in.clients -}}
{{- if or (hasSuffix "/0" .) (has . (list "0.0.0.0" "::")) -}}
{{- fail (printf "nfs-provisioner.inCluster.clients has %s: the whole world could mount the export. Give the nodes' networks, for example 10.0.0.0/24." .) -}}
{{- end -}}
{{- end -}}
{{- if and (not $in.namespace) (ne .Values.global.podSecurity.level "privileged") -}}
{{- fail (printf "nfs-provisioner.inCluster needs capabilities and a host path, which Pod Security restricted forbids in namespace %s. Set nfs-provisioner.inCluster.namespace to a namespace labelled pod-security.kubernetes.io/enforce: privileged." .Release.Namespace) -}}
{{- end -}}
{{- else if eq .Values.mode "nodePath" -}}
{{- if not .Values.nodePath.path -}}
{{- fail "nfs-provisioner.nodePath.path is empty with mode: nodePath. Name the directory on the node." -}}
{{- end -}}
{{- if gt (int .Values.global.nodes) 1 -}}
{{- fail (printf "nfs-provisioner.mode is nodePath with global.nodes: %d: every node would see another directory. Use mode: external or inCluster, or one node." (int .Values.global.nodes)) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "nfs-provisioner.config" -}}
{{- $in := .Values.inCluster -}}
NFS_CORE_PARAM {
    Protocols = 4;
    NFS_Port = 2049;
    # No NFSv3 side services.
    Enable_NLM = false;
    Enable_RQUOTA = false;
    Enable_UDP = false;
    # It would need a capability that not every node has to give; without it the server says so when it starts.
    Allow_Set_Io_Flusher_Fail = true;
}
NFSv4 {
    Minor_Versions = 1, 2;
    Grace_Period = {{ int $in.graceSeconds }};
    Lease_Lifetime = {{ div (add (int $in.graceSeconds) 1) 2 }};
    # Owners are user ids: nothing to look up, and the same on every node.
    Only_Numeric_Owners = true;
    # Which clients there were, on the disk itself: after a restart they get their files and locks back.
    RecoveryBackend = fs;
    RecoveryRoot = /data/recovery;
}
NFS_KRB5 {
    Active_krb5 = false;
}
EXPORT_DEFAULTS {
    Protocols = 4;
    Transports = TCP;
    SecType = sys;
    Access_Type = None;
}
EXPORT {
    Export_Id = 1;
    Path = /data/storage;
    Pseudo = /storage;
    # Nobody but the named networks, from ports that only a client's root may use; and that root is nobody special.
    PrivilegedPort = true;
    Squash = Root_Squash;
    Anonymous_Uid = {{ int .Values.global.podSecurity.runAsUser }};
    Anonymous_Gid = {{ int .Values.global.podSecurity.runAsGroup }};
    FSAL { Name = VFS; }
    CLIENT {
        Clients = {{ join ", " $in.clients }};
        Access_Type = RW;
    }
}
LOG {
    Default_Log_Level = EVENT;
    Facility { name = STDERR_LOG; destination = STDERR; enable = active; }
}
{{- end }}
