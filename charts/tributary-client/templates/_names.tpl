{{- define "client.namespace" -}}
{{ .Values.namespace.name | default .Release.Namespace }}
{{- end }}

{{- define "client.labels" -}}
app.kubernetes.io/name: tributary-client
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "client.metadata" -}}
namespace: {{ include "client.namespace" . }}
labels:
  {{- include "client.labels" . | nindent 2 }}
{{- end }}

{{- /* A Secret with S3 keys, made only if they are given. Arguments: root, name, keys, field (for the error). */ -}}
{{- define "client.credentials" -}}
{{- if .keys.accessKeyId }}
---
apiVersion: v1
kind: Secret
metadata:
  name: {{ required (printf "credentials are given, but %s does not name their Secret" .field) .name }}
  {{- include "client.metadata" .root | nindent 2 }}
type: Opaque
stringData:
  AWS_ACCESS_KEY_ID: {{ .keys.accessKeyId | quote }}
  AWS_SECRET_ACCESS_KEY: {{ .keys.secretAccessKey | quote }}
{{- end }}
{{- end }}
