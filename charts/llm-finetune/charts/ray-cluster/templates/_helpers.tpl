{{- define "ray-cluster.labels" -}}{{ include "llm-finetune.labels" (dict "root" . "component" "ray-cluster") }}{{- end }}

{{/* A group with the defaults filled in, as JSON: (dict "root" $ "group" group). */}}
{{- define "ray-cluster.group" -}}
{{- $group := mergeOverwrite (deepCopy .root.Values.workerDefaults) (deepCopy .group) -}}
{{- if lt (int $group.minReplicas) 0 -}}{{- $_ := set $group "minReplicas" $group.replicas -}}{{- end -}}
{{- if lt (int $group.maxReplicas) 0 -}}{{- $_ := set $group "maxReplicas" $group.replicas -}}{{- end -}}
{{- $group | toJson -}}
{{- end }}

{{/* What no Kubernetes schema can say about a group. */}}
{{- define "ray-cluster.checkGroup" -}}
{{- $where := printf "ray-cluster.workerGroups[%s]" .group.name -}}
{{- $level := .root.Values.global.podSecurity.level -}}
{{- if and (gt (int .group.gpus) 0) (not .root.Values.global.gpu.available) -}}
{{- fail (printf "%s.gpus is %d, but the site declares no GPUs. Set global.gpu.available: true if nodes offer %s (nvidia-device-plugin.enabled: true, or a GPU operator), or gpus: 0." $where (int .group.gpus) .root.Values.global.gpu.resourceName) -}}
{{- end -}}
{{- if gt (int .group.minReplicas) (int .group.maxReplicas) -}}
{{- fail (printf "%s.minReplicas (%d) is above its maxReplicas (%d). Swap them or leave both out." $where (int .group.minReplicas) (int .group.maxReplicas)) -}}
{{- end -}}
{{- if or (lt (int .group.replicas) (int .group.minReplicas)) (gt (int .group.replicas) (int .group.maxReplicas)) -}}
{{- fail (printf "%s.replicas (%d) is not between minReplicas (%d) and maxReplicas (%d). Set it between them." $where (int .group.replicas) (int .group.minReplicas) (int .group.maxReplicas)) -}}
{{- end -}}
{{- $shm := include "llm-finetune.bytes" .group.shmSize | int64 -}}
{{- $memory := include "llm-finetune.bytes" .group.memory | int64 -}}
{{- $store := include "llm-finetune.bytes" .group.objectStoreMemory | int64 -}}
{{- if gt $shm $memory -}}
{{- fail (printf "%s.shmSize (%s) is above its memory (%s), of which it is a part. Raise memory or lower shmSize." $where .group.shmSize .group.memory) -}}
{{- end -}}
{{- if gt $store $shm -}}
{{- fail (printf "%s.objectStoreMemory (%s) does not fit into its shmSize (%s). Raise shmSize or lower objectStoreMemory." $where .group.objectStoreMemory .group.shmSize) -}}
{{- end -}}
{{- if lt $store 78643200 -}}
{{- fail (printf "%s.objectStoreMemory (%s) is below Ray's minimum of 75Mi. Raise it." $where .group.objectStoreMemory) -}}
{{- end -}}
{{- if ne $level "privileged" -}}
{{- if .group.network.hostNetwork -}}
{{- fail (printf "%s.network.hostNetwork is true, which Pod Security restricted forbids. Label the namespace pod-security.kubernetes.io/enforce: privileged and set global.podSecurity.level: privileged, or hostNetwork: false." $where) -}}
{{- end -}}
{{- if .group.network.rdma.ipcLock -}}
{{- fail (printf "%s.network.rdma.ipcLock is true, which Pod Security restricted forbids. Label the namespace pod-security.kubernetes.io/enforce: privileged and set global.podSecurity.level: privileged, or raise the runtime's memlock limit and set ipcLock: false." $where) -}}
{{- end -}}
{{- if eq .group.scratch.kind "hostPath" -}}
{{- fail (printf "%s.scratch.kind is hostPath, which Pod Security restricted forbids. Label the namespace pod-security.kubernetes.io/enforce: privileged and set global.podSecurity.level: privileged, or use kind: emptyDir." $where) -}}
{{- end -}}
{{- end -}}
{{- if and (eq .group.scratch.kind "hostPath") (not .group.scratch.hostPath) -}}
{{- fail (printf "%s.scratch.hostPath is empty with kind: hostPath. Name the directory on the node, for example /nvme/scratch." $where) -}}
{{- end -}}
{{- end }}

{{/* Environment of head and workers. */}}
{{- define "ray-cluster.env" -}}
- {name: HOME, value: /tmp}
# Compilers and caches ask for the user's name, and uid {{ int .root.Values.global.podSecurity.runAsUser }} may have none in the image.
- {name: USER, value: ray}
- {name: LOGNAME, value: ray}
- {name: HF_HOME, value: {{ printf "%s/%s" .root.Values.global.storage.mountPath .root.Values.hubCache | quote }}}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
{{- range .root.Values.secretEnv }}
- name: {{ .name }}
  valueFrom:
    secretKeyRef: {name: {{ .secretName }}, key: {{ .key }}, optional: {{ .optional | default false }}}
{{- end }}
{{- end }}

{{/* Volumes of head and workers: (dict "root" $ "shm" "2Gi"). */}}
{{- define "ray-cluster.volumes" -}}
- name: storage
  persistentVolumeClaim:
    claimName: {{ .root.Values.global.storage.claimName }}
- name: tmp
  emptyDir: {}
- name: shm
  emptyDir: {medium: Memory, sizeLimit: {{ .shm | quote }}}
{{- end }}

{{- define "ray-cluster.volumeMounts" -}}
- {name: storage, mountPath: {{ .Values.global.storage.mountPath | quote }}}
- {name: tmp, mountPath: /tmp}
- {name: shm, mountPath: /dev/shm}
{{- end }}

{{/* RayCluster specification, for the standing cluster and for the runs' own: (dict "root" $ "standing" true). */}}
{{- define "ray-cluster.spec" -}}
{{- $root := .root -}}
{{- $v := $root.Values -}}
{{- if not $v.workerGroups -}}
{{- fail "ray-cluster.workerGroups is empty: runs would wait for workers for ever. Name at least one group." -}}
{{- end -}}
{{- $image := include "llm-finetune.image" $v.global.images.trainer -}}
{{- $headShm := $v.head.objectStoreMemory -}}
{{- if gt (include "llm-finetune.bytes" $headShm | int64) (include "llm-finetune.bytes" $v.head.memory | int64) -}}
{{- fail (printf "ray-cluster.head.objectStoreMemory (%s) is above ray-cluster.head.memory (%s), of which it is a part. Raise memory or lower objectStoreMemory." $headShm $v.head.memory) -}}
{{- end -}}
rayVersion: {{ $v.global.rayCluster.version | quote }}
{{- if eq $v.auth.mode "token" }}
authOptions:
  mode: token
  {{- with $v.auth.secretName }}
  secretName: {{ . }}
  {{- end }}
{{- else }}
authOptions:
  mode: disabled
{{- end }}
{{- if .standing }}
upgradeStrategy:
  type: {{ $v.upgradeStrategy | quote }}
{{- end }}
{{- if $v.autoscaling.enabled }}
enableInTreeAutoscaling: true
autoscalerOptions:
  version: v2
  idleTimeoutSeconds: {{ int $v.autoscaling.idleTimeoutSeconds }}
  imagePullPolicy: {{ $v.global.imagePullPolicy }}
  securityContext:
    {{- include "llm-finetune.securityContext" $root | nindent 4 }}
  volumeMounts:
    - {name: tmp, mountPath: /tmp}
{{- end }}
headGroupSpec:
  rayStartParams:
    num-cpus: "0"
    num-gpus: "0"
    dashboard-host: 0.0.0.0
    object-store-memory: {{ include "llm-finetune.bytes" $v.head.objectStoreMemory | quote }}
  template:
    metadata:
      labels:
        {{- include "llm-finetune.rayPodLabels" (dict "root" $root "component" "ray-head") | nindent 8 }}
    spec:
      {{- if not $v.autoscaling.enabled }}
      automountServiceAccountToken: false
      {{- end }}
      enableServiceLinks: false
      terminationGracePeriodSeconds: {{ int $v.head.terminationGracePeriodSeconds }}
      {{- include "llm-finetune.pullSecrets" $root | nindent 6 }}
      securityContext:
        {{- include "llm-finetune.podSecurityContext" $root | nindent 8 }}
      containers:
        - name: ray-head
          image: {{ $image }}
          imagePullPolicy: {{ $v.global.imagePullPolicy }}
          env:
            {{- include "ray-cluster.env" (dict "root" $root) | nindent 12 }}
            # The head takes no GPU even where the node's default runtime would hand out all of them.
            - {name: NVIDIA_VISIBLE_DEVICES, value: void}
            {{- with $v.head.env }}
            {{- toYaml . | nindent 12 }}
            {{- end }}
          ports:
            - {name: gcs-server, containerPort: 6379}
            - {name: dashboard, containerPort: 8265}
            - {name: metrics, containerPort: 8080}
          lifecycle:
            preStop:
              # The container's first process is a shell that passes no signal on: without this, stopping takes the whole grace period.
              exec:
                command: [ray, stop, --force]
          resources:
            requests:
              cpu: {{ $v.head.cpuRequest | quote }}
              memory: {{ $v.head.memoryRequest | default $v.head.memory | quote }}
            limits:
              {{- with $v.head.cpuLimit }}
              cpu: {{ . | quote }}
              {{- end }}
              memory: {{ $v.head.memory | quote }}
          securityContext:
            {{- include "llm-finetune.securityContext" $root | nindent 12 }}
          volumeMounts:
            {{- include "ray-cluster.volumeMounts" $root | nindent 12 }}
      volumes:
        {{- include "ray-cluster.volumes" (dict "root" $root "shm" $headShm) | nindent 8 }}
      {{- with $v.head.nodeSelector }}
      nodeSelector:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with $v.head.tolerations }}
      tolerations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with $v.head.priorityClassName }}
      priorityClassName: {{ . }}
      {{- end }}
workerGroupSpecs:
{{- $names := dict }}
{{- range $v.workerGroups }}
{{- $group := include "ray-cluster.group" (dict "root" $root "group" .) | fromJson }}
{{- include "ray-cluster.checkGroup" (dict "root" $root "group" $group) }}
{{- if hasKey $names $group.name }}
{{- fail (printf "ray-cluster.workerGroups has two groups named %s. Give each a name of its own." $group.name) }}
{{- end }}
{{- $_ := set $names $group.name true }}
{{- include "ray-cluster.workerGroup" (dict "root" $root "group" $group "image" $image) | nindent 2 }}
{{- end }}
{{- end }}
