{{- define "chatbot.fullname" -}}{{ include "llm-finetune.fullname" (dict "root" .) }}{{- end }}
{{- define "chatbot.labels" -}}{{ include "llm-finetune.labels" (dict "root" . "component" "chatbot") }}{{- end }}
{{- define "chatbot.selector" -}}{{ include "llm-finetune.selector" (dict "root" . "component" "chatbot") }}{{- end }}

{{/* Seconds for running answers after SIGTERM. */}}
{{- define "chatbot.shutdown" -}}{{ dig "server" "shutdown_seconds" 60 .Values.config | int }}{{- end }}

{{/* The configuration file: the user's, with what the chart knows better. */}}
{{- define "chatbot.config" -}}
{{- $config := deepCopy .Values.config -}}
{{- range $key, $value := dict "host" "0.0.0.0" "port" 7860 "temporary" "/tmp/chatbot" -}}
{{- if hasKey (default dict $config.server) $key -}}
{{- fail (printf "chatbot.config.server.%s is set by the chart (%v). Leave it out." $key $value) -}}
{{- end -}}
{{- end -}}
{{- if hasKey $config "storage" -}}
{{- fail "chatbot.config.storage is set by the chart. Set global.storage.mountPath." -}}
{{- end -}}
{{- $_ := set $config "storage" .Values.global.storage.mountPath -}}
{{- $_ := set $config "server" (merge (dict "host" "0.0.0.0" "port" 7860 "temporary" "/tmp/chatbot" "shutdown_seconds" (include "chatbot.shutdown" . | int)) (default dict $config.server)) -}}
{{- toYaml $config -}}
{{- end }}

{{/* What no schema can say. */}}
{{- define "chatbot.check" -}}
{{- $serve := .Values.config.serve -}}
{{- $follow := default "none" $serve.follow -}}
{{- if and (eq $follow "none") (not $serve.run) -}}
{{- fail "chatbot.config.serve.run is empty. Name the run that is served (kubectl get rayjobs), or set chatbot.config.serve.follow: latest for development." -}}
{{- end -}}
{{- if and (eq $follow "latest") (or $serve.run $serve.sha256) -}}
{{- fail (printf "chatbot.config.serve.follow: latest picks the run itself, but serve.run or serve.sha256 is set (%s). Leave both empty, or set follow: none." (default $serve.sha256 $serve.run)) -}}
{{- end -}}
{{- if and (gt (int .Values.gpus) 0) (not .Values.global.gpu.available) -}}
{{- fail (printf "chatbot.gpus is %d, but the site declares no GPUs. Set global.gpu.available: true if nodes offer %s, or gpus: 0." (int .Values.gpus) .Values.global.gpu.resourceName) -}}
{{- end -}}
{{- if and .Values.ingress.enabled (not .Values.ingress.host) -}}
{{- fail "chatbot.ingress.host is empty with chatbot.ingress.enabled: true. Name the host, for example chat.example.org." -}}
{{- end -}}
{{- if and (gt (int .Values.service.nodePort) 0) (ne .Values.service.type "NodePort") -}}
{{- fail (printf "chatbot.service.nodePort is %d with type %s. Set chatbot.service.type: NodePort, or nodePort: 0." (int .Values.service.nodePort) .Values.service.type) -}}
{{- end -}}
{{- if and .Values.autoscaling.enabled (gt (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas)) -}}
{{- fail (printf "chatbot.autoscaling.minReplicas (%d) is above maxReplicas (%d). Swap them." (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas)) -}}
{{- end -}}
{{- $many := or (gt (int .Values.replicas) 1) .Values.autoscaling.enabled -}}
{{- if and $many (eq (dig "access" "mode" "none" .Values.config) "users") (not (dig "access" "session_key_file" "" .Values.config)) -}}
{{- fail "chatbot.config.access.session_key_file is empty with several pods: each would reject the others' sessions. Mount a Secret with the key (chatbot.secrets) and name the file." -}}
{{- end -}}
{{- $records := dig "records" "directory" "" .Values.config -}}
{{- if and $records (not (hasPrefix (printf "%s/" .Values.global.storage.mountPath) $records)) -}}
{{- fail (printf "chatbot.config.records.directory (%s) is not below global.storage.mountPath (%s), and the rest of the pod is read-only. Put it there, for example %s/chatbot." $records .Values.global.storage.mountPath .Values.global.storage.mountPath) -}}
{{- end -}}
{{- end }}
