{{- define "kuberay-operator.fullname" -}}{{ include "llm-finetune.fullname" (dict "root" .) }}{{- end }}
{{- define "kuberay-operator.labels" -}}{{ include "llm-finetune.labels" (dict "root" . "component" "operator") }}{{- end }}
{{- define "kuberay-operator.selector" -}}{{ include "llm-finetune.selector" (dict "root" . "component" "operator") }}{{- end }}

{{/* Watched namespaces as a JSON list. */}}
{{- define "kuberay-operator.namespaces" -}}
{{ .Values.watchNamespaces | default (list .Release.Namespace) | uniq | toJson }}
{{- end }}
