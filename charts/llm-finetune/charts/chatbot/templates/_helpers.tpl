{{- define "chatbot.fullname" -}}{{ include "llm-finetune.fullname" (dict "root" .) }}{{- end }}
{{- define "chatbot.labels" -}}{{ include "llm-finetune.labels" (dict "root" . "component" "chatbot") }}{{- end }}
{{- define "chatbot.selector" -}}{{ include "llm-finetune.selector" (dict "root" . "component" "chatbot") }}{{- end }}

{{/* vLLM serves one run: its objects carry the run's hash, so that a promotion starts a second server beside the first. */}}
{{- define "chatbot.vllm.component" -}}vllm-{{ .Values.config.serve.run | splitList "-" | last }}{{- end }}
{{- define "chatbot.vllm.fullname" -}}{{ include "llm-finetune.fullname" (dict "root" . "suffix" (include "chatbot.vllm.component" .)) }}{{- end }}
{{- define "chatbot.vllm.labels" -}}{{ include "llm-finetune.labels" (dict "root" . "component" (include "chatbot.vllm.component" .)) }}{{- end }}
{{- define "chatbot.vllm.selector" -}}{{ include "llm-finetune.selector" (dict "root" . "component" (include "chatbot.vllm.component" .)) }}{{- end }}

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
{{- if .Values.vllm.enabled -}}
{{- $url := printf "http://%s:8000/v1" (include "chatbot.vllm.fullname" .) -}}
{{- $_ := set $config "engine" (merge (dict "kind" "openai" "url" $url "model" $config.serve.run) (default dict $config.engine)) -}}
{{- end -}}
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
{{- if .Values.vllm.enabled -}}
{{- if not .Values.global.gpu.available -}}
{{- fail (printf "chatbot.vllm.enabled is true, but the site declares no GPUs. Set global.gpu.available: true if nodes offer %s, or chatbot.vllm.enabled: false." .Values.global.gpu.resourceName) -}}
{{- end -}}
{{- if gt (int .Values.gpus) 0 -}}
{{- fail (printf "chatbot.gpus is %d, but chatbot.vllm generates the answers. Set chatbot.gpus: 0." (int .Values.gpus)) -}}
{{- end -}}
{{- if eq $follow "latest" -}}
{{- fail "chatbot.config.serve.follow is latest, but vLLM loads one run when it starts. Name the run in chatbot.config.serve.run, or set chatbot.vllm.enabled: false." -}}
{{- end -}}
{{- if $serve.base -}}
{{- fail "chatbot.config.serve.base is true, but vLLM serves the tuned model alone. Set it to false, or chatbot.vllm.enabled: false." -}}
{{- end -}}
{{- range $key := list "kind" "url" "model" "base_model" -}}
{{- if hasKey (default dict $.Values.config.engine) $key -}}
{{- fail (printf "chatbot.config.engine.%s is set by the chart with chatbot.vllm.enabled: true. Leave it out." $key) -}}
{{- end -}}
{{- end -}}
{{- if not (or .Values.global.images.vllm.tag .Values.global.images.vllm.digest) -}}
{{- fail "global.images.vllm has neither a tag nor a digest. Name the vLLM version that you have tried, by its digest if you can." -}}
{{- end -}}
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
