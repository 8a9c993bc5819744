{{- define "aisle.labels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "aisle.allLabels" -}}
{{ include "aisle.labels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{/* User and security settings of every pod. */}}
{{- define "aisle.podSecurity" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 1000
  runAsGroup: 1000
  fsGroup: 1000
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: { type: RuntimeDefault }
{{- with .Values.pullSecrets }}
imagePullSecrets:
{{- range . }}
- name: {{ . }}
{{- end }}
{{- end }}
{{- end }}

{{- define "aisle.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: { drop: [ALL] }
{{- end }}

{{/* Resources of a pool's container, with its GPUs. Takes (dict "pool" pool). */}}
{{- define "aisle.resources" -}}
{{- $resources := deepCopy .pool.resources -}}
{{- if .pool.gpus }}{{ $_ := set $resources.limits "nvidia.com/gpu" .pool.gpus }}{{ end -}}
{{ toYaml $resources }}
{{- end }}

{{- define "aisle.placement" -}}
{{- if and .gpus .runtimeClassName }}
runtimeClassName: {{ .runtimeClassName }}
{{- end }}
{{- with .nodeSelector }}
nodeSelector: {{ toJson . }}
{{- end }}
{{- with .tolerations }}
tolerations: {{ toJson . }}
{{- end }}
{{- end }}

{{- define "aisle.repositoryClaim" -}}
{{ .Values.repository.claim | default (printf "%s-repository" .Release.Name) }}
{{- end }}
