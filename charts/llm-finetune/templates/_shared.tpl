{{/*
What every part needs in the same form. Named templates are global in an umbrella: the parts' own helpers carry their names.
*/}}

{{/* Image reference of {repository, tag, digest}; the digest wins. */}}
{{- define "llm-finetune.image" -}}
{{- if .digest -}}{{ .repository }}@{{ .digest }}{{- else -}}{{ .repository }}:{{ .tag }}{{- end -}}
{{- end }}

{{/* Name of a part's objects: (dict "root" $ "suffix" "x"). */}}
{{- define "llm-finetune.fullname" -}}
{{- $name := .root.Chart.Name -}}
{{- if contains $name .root.Release.Name -}}{{- $name = .root.Release.Name -}}{{- else -}}{{- $name = printf "%s-%s" .root.Release.Name $name -}}{{- end -}}
{{- if .suffix -}}{{- $name = printf "%s-%s" $name .suffix -}}{{- end -}}
{{- $name | trunc 63 | trimSuffix "-" -}}
{{- end }}

{{/* Labels by which a part's pods are selected: (dict "root" $ "component" "x"). */}}
{{- define "llm-finetune.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/* All recommended labels: (dict "root" $ "component" "x"). */}}
{{- define "llm-finetune.labels" -}}
{{ include "llm-finetune.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: llm-finetune
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end }}

{{/*
Labels of pods that KubeRay makes. KubeRay finds the head by app.kubernetes.io/name: kuberay, which must not be replaced.
*/}}
{{- define "llm-finetune.rayPodLabels" -}}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
app.kubernetes.io/part-of: llm-finetune
{{- end }}

{{/* Pod security context under Pod Security `restricted`. */}}
{{- define "llm-finetune.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: {{ int .Values.global.podSecurity.runAsUser }}
runAsGroup: {{ int .Values.global.podSecurity.runAsGroup }}
fsGroup: {{ int .Values.global.podSecurity.runAsGroup }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{/* Container security context under Pod Security `restricted`. */}}
{{- define "llm-finetune.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* imagePullSecrets of a pod. */}}
{{- define "llm-finetune.pullSecrets" -}}
{{- with .Values.global.imagePullSecrets -}}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end }}

{{/* Several pods of a part on different nodes, where there are as many: (dict "root" $ "component" "x"). */}}
{{- define "llm-finetune.spread" -}}
affinity:
  podAntiAffinity:
    preferredDuringSchedulingIgnoredDuringExecution:
      - weight: 100
        podAffinityTerm:
          topologyKey: kubernetes.io/hostname
          labelSelector:
            matchLabels:
              {{- include "llm-finetune.selector" . | nindent 14 }}
{{- end }}

{{/* Egress rule for name resolution. */}}
{{- define "llm-finetune.dnsEgress" -}}
- ports:
    - {port: 53, protocol: UDP}
    - {port: 53, protocol: TCP}
{{- end }}

{{/* Egress rule to a list of networks: (dict "networks" [...] "ports" [...]). */}}
{{- define "llm-finetune.egressTo" -}}
- to:
{{- range .networks }}
    - ipBlock: {cidr: {{ . | quote }}}
{{- end }}
  ports:
{{- range .ports }}
    - {port: {{ int . }}, protocol: TCP}
{{- end }}
{{- end }}

{{/* Bytes of a quantity such as 512Mi, 2G or 1073741824. */}}
{{- define "llm-finetune.bytes" -}}
{{- $q := toString . -}}
{{- $units := dict "" 1 "k" 1000 "M" 1000000 "G" 1000000000 "T" 1000000000000 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 -}}
{{- $number := regexFind "^[0-9]+(\\.[0-9]+)?" $q -}}
{{- $unit := trimPrefix $number $q -}}
{{- if or (not $number) (not (hasKey $units $unit)) -}}
{{- fail (printf "%s is not an amount of memory. Write a number and a unit, for example 512Mi or 16Gi." $q) -}}
{{- end -}}
{{- mulf (float64 $number) (get $units $unit) | int64 -}}
{{- end }}

{{/* Python of the test pods: `status(url)`. Where the network's rules are kept by an agent, it knows a new pod only after some seconds. */}}
{{- define "llm-finetune.testStatus" -}}
import sys, time, urllib.error, urllib.request
def status(url):
    for _ in range(30):
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code
        except OSError as error:
            reason = error
            time.sleep(2)
    sys.exit(f"{url} does not answer: {reason}")
{{- end }}
