{{- define "glm4.name" -}}
{{- $name := .Release.Name -}}
{{- if not (contains .Chart.Name $name) }}{{ $name = printf "%s-%s" $name .Chart.Name }}{{ end -}}
{{- $name | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "glm4.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "glm4.labels" -}}
{{ include "glm4.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{/* Refuse values that cannot be served. */}}
{{- define "glm4.checks" -}}
{{- if and .Values.bundle.claim .Values.bundle.hub.name }}{{ fail "set bundle.claim or bundle.hub.name, not both" }}{{ end -}}
{{- if not (or .Values.bundle.claim .Values.bundle.hub.name) }}{{ fail "set bundle.claim or bundle.hub.name: where the bundle is" }}{{ end -}}
{{- if not (or .Values.apiKeysSecret .Values.allowAnonymous) }}{{ fail "set apiKeysSecret, or allowAnonymous: true" }}{{ end -}}
{{- if and .Values.apiKeysSecret .Values.allowAnonymous }}{{ fail "set apiKeysSecret or allowAnonymous, not both" }}{{ end -}}
{{- if and .Values.serviceMonitor.enabled .Values.apiKeysSecret (not .Values.serviceMonitor.keySecret) }}{{ fail "set serviceMonitor.keySecret: /metrics needs an API key" }}{{ end -}}
{{- end -}}

{{/* A probe: the name localhost is accepted whatever --allow-host says. */}}
{{- define "glm4.probe" -}}
httpGet:
  path: {{ . }}
  port: http
  httpHeaders:
    - name: Host
      value: localhost
{{- end -}}
