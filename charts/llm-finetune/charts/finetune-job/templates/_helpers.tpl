
{{/* Trainer image. */}}
{{- define "finetune-job.image" -}}{{ include "llm-finetune.image" .Values.global.images.trainer }}{{- end }}

{{/*
First ten digits of the sha256 over {"image": ..., "run": ...}: sorted keys, no spaces, the digest (or repository:tag) of the trainer image,
and the run as it is written. tools/runid.py computes the same.
*/}}
{{- define "finetune-job.hash" -}}
{{- $image := .Values.global.images.trainer -}}
{{- $identity := $image.digest | default (printf "%s:%s" $image.repository $image.tag) -}}
{{- dict "image" $identity "run" .Values.run | toJson | sha256sum | trunc 10 -}}
{{- end }}

{{/* Versions of Helm treat nulls differently, and the run's name depends on what is left: (dict "value" v "where" "path"). */}}
{{- define "finetune-job.refuseNulls" -}}
{{- $where := .where -}}
{{- if kindIs "invalid" .value -}}
{{- fail (printf "%s is null. Leave the key out." $where) -}}
{{- else if kindIs "map" .value -}}
{{- range $key, $value := .value -}}
{{- include "finetune-job.refuseNulls" (dict "value" $value "where" (printf "%s.%s" $where $key)) -}}
{{- end -}}
{{- else if kindIs "slice" .value -}}
{{- range $i, $value := .value -}}
{{- include "finetune-job.refuseNulls" (dict "value" $value "where" (printf "%s[%d]" $where $i)) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* Name of RayJob, Ray Train run and run directory. */}}
{{- define "finetune-job.id" -}}
{{- if not .Values.run -}}
{{- fail "finetune-job.run is empty while finetune-job.enabled is true. Write the run (environments/<env>/finetune.yaml), or set finetune-job.enabled: false." -}}
{{- end -}}
{{- include "finetune-job.refuseNulls" (dict "value" .Values.run "where" "finetune-job.run") -}}
{{- $name := toString .Values.run.name -}}
{{- if gt (len $name) 36 -}}
{{- fail (printf "finetune-job.run.name (%s) has %d characters. With the hash the RayJob's name must stay within KubeRay's 47: use at most 36." $name (len $name)) -}}
{{- end -}}
{{- printf "%s-%s" $name (include "finetune-job.hash" .) -}}
{{- end }}

{{/*
The trainer's configuration as one line of JSON (which is YAML). The submitter puts it into a shell command in double quotes: there
$ and ` would be read by the shell, so they are written as JSON escapes, which the trainer reads as the same characters.
*/}}
{{- define "finetune-job.config" -}}
{{- $config := dict "run" .Values.run "resources" .Values.resources "storage" .Values.global.storage.mountPath "id" (include "finetune-job.id" .) -}}
{{- $config | toJson | replace "$" "\\u0024" | replace "`" "\\u0060" | replace "\u007f" "\\u007f" -}}
{{- end }}

{{/* The RayJob: (dict "root" finetune-job's context "clusterSpec" YAML or ""). */}}
{{- define "finetune-job.rayjob" -}}
{{- $root := .root -}}
{{- $v := $root.Values -}}
{{- $id := include "finetune-job.id" $root -}}
{{- range $name, $value := $v.env -}}
{{- if regexMatch "[$`]" $value -}}
{{- fail (printf "finetune-job.env.%s holds $ or a backquote, which the submitter's shell would read. Leave them out." $name) -}}
{{- end -}}
{{- if regexMatch "(?i)(token|password|secret|api_?key)$" $name -}}
{{- fail (printf "finetune-job.env.%s looks like a secret; it would be readable in the RayJob and in Ray's dashboard. Put it into a Secret and name that in ray-cluster.secretEnv." $name) -}}
{{- end -}}
{{- end -}}
{{- if hasKey $v.env "LLM_FINETUNE_CONFIG" -}}
{{- fail "finetune-job.env.LLM_FINETUNE_CONFIG is made by the chart. Write the run under finetune-job.run." -}}
{{- end -}}
{{- if and $v.kueue.queue (not .clusterSpec) -}}
{{- fail (printf "finetune-job.kueue.queue is %s, but Kueue admits runs only on clusters of their own. Set global.rayCluster.standing: false, or queue the standing cluster with ray-cluster.kueue.queue." $v.kueue.queue) -}}
{{- end -}}
{{- if and (gt (float64 (dig "gpus_per_worker" 0 $v.resources)) 0.0) (not $v.global.gpu.available) -}}
{{- fail (printf "finetune-job.resources.gpus_per_worker is %v, but the site declares no GPUs. Set global.gpu.available: true and give ray-cluster.workerGroups GPUs, or gpus_per_worker: 0." $v.resources.gpus_per_worker) -}}
{{- end -}}
apiVersion: ray.io/v1
kind: RayJob
metadata:
  name: {{ $id }}
  namespace: {{ $root.Release.Namespace }}
  labels:
    {{- include "llm-finetune.labels" (dict "root" $root "component" "run") | nindent 4 }}
    llm-finetune/run: {{ $v.run.name }}
    llm-finetune/hash: {{ include "finetune-job.hash" $root | quote }}
    {{- with $v.kueue.queue }}
    kueue.x-k8s.io/queue-name: {{ . }}
    {{- end }}
    {{- with $v.kueue.priorityClass }}
    kueue.x-k8s.io/priority-class: {{ . }}
    {{- end }}
  annotations:
    # A run stays when the environment moves on to another one.
    argocd.argoproj.io/sync-options: Prune=false,SkipDryRunOnMissingResource=true
    argocd.argoproj.io/compare-options: IgnoreExtraneous
    # A failed run stays too, and must not leave the environment Degraded after a good push. The RayJob's own health says it.
    argocd.argoproj.io/ignore-healthcheck: "true"
    helm.sh/resource-policy: keep
spec:
  entrypoint: python -m trainer run --config env:LLM_FINETUNE_CONFIG
  runtimeEnvYAML: |
    env_vars:
      LLM_FINETUNE_CONFIG: {{ include "finetune-job.config" $root | quote }}
      {{- range $name := keys $v.env | sortAlpha }}
      {{ $name }}: {{ get $v.env $name | quote }}
      {{- end }}
  submissionMode: {{ $v.submission.mode }}
  {{- if eq $v.submission.mode "K8sJobMode" }}
  submitterConfig:
    backoffLimit: {{ int $v.submission.retries }}
  submitterPodTemplate:
    metadata:
      labels:
        {{- include "llm-finetune.labels" (dict "root" $root "component" "submitter") | nindent 8 }}
    spec:
      restartPolicy: Never
      automountServiceAccountToken: false
      enableServiceLinks: false
      {{- include "llm-finetune.pullSecrets" $root | nindent 6 }}
      securityContext:
        {{- include "llm-finetune.podSecurityContext" $root | nindent 8 }}
      {{- if not .clusterSpec }}
      initContainers:
        # After the head was lost: a submitter that finds none fails, and Kubernetes waits longer each time before it starts the next.
        - name: wait-for-head
          image: {{ include "finetune-job.image" $root }}
          imagePullPolicy: {{ $v.global.imagePullPolicy }}
          command: [bash, -c]
          args:
            - until timeout 3 bash -c 'exec 3<>/dev/tcp/{{ $v.global.rayCluster.name }}-head-svc/8265' 2>/dev/null; do sleep 1; done
          resources:
            requests: {cpu: 10m, memory: 16Mi}
            limits: {memory: 64Mi}
          securityContext:
            {{- include "llm-finetune.securityContext" $root | nindent 12 }}
      {{- end }}
      containers:
        - name: submitter
          image: {{ include "finetune-job.image" $root }}
          imagePullPolicy: {{ $v.global.imagePullPolicy }}
          env:
            - {name: HOME, value: /tmp}
            - {name: USER, value: ray}
          resources:
            {{- toYaml $v.submission.resources | nindent 12 }}
          securityContext:
            {{- include "llm-finetune.securityContext" $root | nindent 12 }}
          volumeMounts:
            - {name: tmp, mountPath: /tmp}
      volumes:
        - name: tmp
          emptyDir: {}
  {{- end }}
  {{- if gt (int $v.activeDeadlineSeconds) 0 }}
  activeDeadlineSeconds: {{ int $v.activeDeadlineSeconds }}
  {{- end }}
  {{- if gt (int $v.preRunningDeadlineSeconds) 0 }}
  preRunningDeadlineSeconds: {{ int $v.preRunningDeadlineSeconds }}
  {{- end }}
  {{- if .clusterSpec }}
  backoffLimit: {{ int $v.backoffLimit }}
  shutdownAfterJobFinishes: true
  ttlSecondsAfterFinished: {{ int $v.ttlSecondsAfterFinished }}
  rayClusterSpec:
    {{- .clusterSpec | nindent 4 }}
  {{- else }}
  # KubeRay refuses backoffLimit, suspend and SidecarMode together with a selector, and never deletes the selected cluster.
  clusterSelector:
    ray.io/cluster: {{ $v.global.rayCluster.name }}
  shutdownAfterJobFinishes: false
  {{- end }}
{{- end }}
