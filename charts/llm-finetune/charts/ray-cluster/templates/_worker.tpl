{{/* One worker group: (dict "root" $ "group" group "image" image). */}}
{{- define "ray-cluster.workerGroup" -}}
{{- $root := .root -}}
{{- $v := $root.Values -}}
{{- $group := .group -}}
{{- $gpus := int $group.gpus -}}
{{- $rdma := $group.network.rdma -}}
- groupName: {{ $group.name }}
  {{- if not $v.autoscaling.enabled }}
  # With autoscaling the number belongs to the autoscaler.
  replicas: {{ int $group.replicas }}
  {{- end }}
  minReplicas: {{ int $group.minReplicas }}
  maxReplicas: {{ int $group.maxReplicas }}
  {{- with $group.labels }}
  labels:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  rayStartParams:
    num-cpus: {{ int $group.cpus | quote }}
    num-gpus: {{ $gpus | quote }}
    object-store-memory: {{ include "llm-finetune.bytes" $group.objectStoreMemory | quote }}
  template:
    metadata:
      labels:
        {{- include "llm-finetune.rayPodLabels" (dict "root" $root "component" "ray-worker") | nindent 8 }}
    spec:
      automountServiceAccountToken: false
      enableServiceLinks: false
      terminationGracePeriodSeconds: {{ int $group.terminationGracePeriodSeconds }}
      {{- include "llm-finetune.pullSecrets" $root | nindent 6 }}
      {{- if $group.network.hostNetwork }}
      hostNetwork: true
      dnsPolicy: ClusterFirstWithHostNet
      {{- end }}
      {{- with $group.runtimeClassName }}
      runtimeClassName: {{ . }}
      {{- end }}
      securityContext:
        {{- include "llm-finetune.podSecurityContext" $root | nindent 8 }}
      {{- if $v.waitForHead }}
      initContainers:
        # Opens the head's port once a second; KubeRay's own check starts Python each time.
        - name: wait-for-head
          image: {{ .image }}
          imagePullPolicy: {{ $v.global.imagePullPolicy }}
          command: [bash, -c]
          args:
            - until (exec 3<>"/dev/tcp/$FQ_RAY_IP/6379") 2>/dev/null; do sleep 1; done
          resources:
            requests: {cpu: 10m, memory: 16Mi}
            limits: {memory: 64Mi}
          securityContext:
            {{- include "llm-finetune.securityContext" $root | nindent 12 }}
      {{- end }}
      containers:
        - name: ray-worker
          image: {{ .image }}
          imagePullPolicy: {{ $v.global.imagePullPolicy }}
          env:
            {{- include "ray-cluster.env" (dict "root" $root) | nindent 12 }}
            {{- if eq $gpus 0 }}
            - {name: NVIDIA_VISIBLE_DEVICES, value: void}
            {{- end }}
            - {name: LLM_FINETUNE_DRAIN_FILE, value: /tmp/drain}
            {{- if ne $group.scratch.kind "none" }}
            - {name: LLM_FINETUNE_SCRATCH, value: {{ $group.scratch.mountPath | quote }}}
            - {name: TORCHINDUCTOR_CACHE_DIR, value: {{ printf "%s/torchinductor" $group.scratch.mountPath | quote }}}
            - {name: TRITON_CACHE_DIR, value: {{ printf "%s/triton" $group.scratch.mountPath | quote }}}
            {{- end }}
            {{- with $group.network.interface }}
            - {name: NCCL_SOCKET_IFNAME, value: {{ . | quote }}}
            - {name: GLOO_SOCKET_IFNAME, value: {{ . | quote }}}
            {{- end }}
            {{- if $rdma.resourceName }}
            {{- with $rdma.hca }}
            - {name: NCCL_IB_HCA, value: {{ . | quote }}}
            {{- end }}
            {{- if ge (int $rdma.gidIndex) 0 }}
            - {name: NCCL_IB_GID_INDEX, value: {{ int $rdma.gidIndex | quote }}}
            {{- end }}
            {{- else if gt $gpus 0 }}
            - {name: NCCL_IB_DISABLE, value: "1"}
            {{- end }}
            {{- with $group.env }}
            {{- toYaml . | nindent 12 }}
            {{- end }}
          ports:
            - {name: metrics, containerPort: 8080}
          lifecycle:
            preStop:
              # Asks the training processes for a checkpoint and waits for it, as long as the grace period allows: trainer/train/stop.py
              # is the other side. Then Ray is stopped: the container's first process is a shell that passes no signal on.
              exec:
                command:
                  - bash
                  - -c
                  - |
                    shopt -s nullglob
                    touch "$LLM_FINETUNE_DRAIN_FILE"
                    training() { for file in "$LLM_FINETUNE_DRAIN_FILE".busy.*; do kill -0 "${file##*.}" && return; done; return 1; }
                    while training && (( SECONDS < {{ sub (int $group.terminationGracePeriodSeconds) 20 }} )); do
                      sleep 0.5
                    done
                    exec ray stop --force
          resources:
            requests:
              cpu: {{ $group.cpuRequest | default (int $group.cpus) | quote }}
              memory: {{ $group.memoryRequest | default $group.memory | quote }}
            limits:
              {{- with $group.cpuLimit }}
              cpu: {{ . | quote }}
              {{- end }}
              memory: {{ $group.memory | quote }}
              {{- if gt $gpus 0 }}
              {{ $v.global.gpu.resourceName }}: {{ $gpus }}
              {{- end }}
              {{- with $rdma.resourceName }}
              {{ . }}: {{ int $rdma.count }}
              {{- end }}
          securityContext:
            {{- if $rdma.ipcLock }}
            allowPrivilegeEscalation: false
            readOnlyRootFilesystem: true
            capabilities:
              drop: [ALL]
              add: [IPC_LOCK]
            {{- else }}
            {{- include "llm-finetune.securityContext" $root | nindent 12 }}
            {{- end }}
          volumeMounts:
            {{- include "ray-cluster.volumeMounts" $root | nindent 12 }}
            {{- if ne $group.scratch.kind "none" }}
            - {name: scratch, mountPath: {{ $group.scratch.mountPath | quote }}}
            {{- end }}
            {{- with $group.volumeMounts }}
            {{- toYaml . | nindent 12 }}
            {{- end }}
      volumes:
        {{- include "ray-cluster.volumes" (dict "root" $root "shm" $group.shmSize) | nindent 8 }}
        {{- if eq $group.scratch.kind "emptyDir" }}
        - name: scratch
          emptyDir: {sizeLimit: {{ $group.scratch.sizeLimit | quote }}}
        {{- else if eq $group.scratch.kind "hostPath" }}
        - name: scratch
          hostPath: {path: {{ $group.scratch.hostPath | quote }}, type: Directory}
        {{- end }}
        {{- with $group.volumes }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- with $group.nodeSelector }}
      nodeSelector:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with $group.tolerations }}
      tolerations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- if $group.onePerNode }}
      affinity:
        podAntiAffinity:
          requiredDuringSchedulingIgnoredDuringExecution:
            - topologyKey: kubernetes.io/hostname
              labelSelector:
                matchLabels:
                  app.kubernetes.io/instance: {{ $root.Release.Name }}
                  ray.io/group: {{ $group.name }}
      {{- end }}
      {{- with $group.priorityClassName }}
      priorityClassName: {{ . }}
      {{- end }}
{{- end }}
