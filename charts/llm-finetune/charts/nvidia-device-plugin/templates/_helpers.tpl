{{- define "nvidia-device-plugin.fullname" -}}{{ include "llm-finetune.fullname" (dict "root" .) }}{{- end }}
{{- define "nvidia-device-plugin.labels" -}}{{ include "llm-finetune.labels" (dict "root" . "component" "device-plugin") }}{{- end }}
{{- define "nvidia-device-plugin.selector" -}}{{ include "llm-finetune.selector" (dict "root" . "component" "device-plugin") }}{{- end }}
{{- define "nvidia-device-plugin.namespace" -}}{{ .Values.namespace | default .Release.Namespace }}{{- end }}

{{- define "nvidia-device-plugin.check" -}}
{{- if not .Values.global.gpu.available -}}
{{- fail "nvidia-device-plugin.enabled is true, but global.gpu.available is false, so that nothing could ask for the GPUs. Set global.gpu.available: true, or nvidia-device-plugin.enabled: false." -}}
{{- end -}}
{{- if and .Values.createRuntimeClass (not .Values.runtimeClassName) -}}
{{- fail "nvidia-device-plugin.createRuntimeClass is true without a name. Set nvidia-device-plugin.runtimeClassName, for example nvidia." -}}
{{- end -}}
{{- if and (not .Values.namespace) (ne .Values.global.podSecurity.level "privileged") -}}
{{- fail (printf "nvidia-device-plugin mounts host directories, which Pod Security restricted forbids in namespace %s. Set nvidia-device-plugin.namespace to a namespace labelled pod-security.kubernetes.io/enforce: privileged." .Release.Namespace) -}}
{{- end -}}
{{- if and (eq .Values.sharing.kind "mps") (ne .Values.migStrategy "none") -}}
{{- fail (printf "nvidia-device-plugin.sharing.kind is mps with migStrategy %s: the plugin cannot share MIG instances by MPS. Use timeSlicing, or migStrategy: none." .Values.migStrategy) -}}
{{- end -}}
{{- $shared := printf "%s.shared" "nvidia.com/gpu" -}}
{{- if and (ne .Values.sharing.kind "none") .Values.sharing.rename (ne .Values.global.gpu.resourceName $shared) -}}
{{- fail (printf "nvidia-device-plugin.sharing.rename offers the shares as %s, but pods ask for %s (global.gpu.resourceName), which no node would have. Set global.gpu.resourceName: %s, or rename: false." $shared .Values.global.gpu.resourceName $shared) -}}
{{- end -}}
{{- end }}

{{/* The plugin's configuration file. */}}
{{- define "nvidia-device-plugin.config" -}}
version: v1
flags:
  migStrategy: {{ .Values.migStrategy }}
  failOnInitError: {{ .Values.failOnInitError }}
  nvidiaDriverRoot: {{ .Values.driverRoot | quote }}
  plugin:
    passDeviceSpecs: false
    deviceListStrategy: [envvar]
    deviceIDStrategy: uuid
  gfd:
    oneshot: false
    noTimestamp: true
    sleepInterval: {{ int .Values.featureDiscovery.intervalSeconds }}s
{{- if ne .Values.sharing.kind "none" }}
sharing:
  {{ .Values.sharing.kind }}:
    renameByDefault: {{ .Values.sharing.rename }}
    {{- if eq .Values.sharing.kind "timeSlicing" }}
    failRequestsGreaterThanOne: true
    {{- end }}
    resources:
      - {name: nvidia.com/gpu, replicas: {{ int .Values.sharing.replicas }}}
{{- end }}
{{- end }}
