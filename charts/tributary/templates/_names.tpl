{{- /* One operator to a cluster, as its CRDs are: names need no release prefix. */ -}}

{{- define "tributary.labels" -}}
app.kubernetes.io/name: tributary
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "tributary.selector" -}}
app.kubernetes.io/name: tributary
app.kubernetes.io/component: operator
{{- end }}

{{- define "tributary.operatorUser" -}}
system:serviceaccount:{{ .Release.Namespace }}:{{ .Values.serviceAccountName }}
{{- end }}

{{- define "tributary.operatorSubject" -}}
kind: ServiceAccount
name: {{ .Values.serviceAccountName }}
namespace: {{ .Release.Namespace }}
{{- end }}

{{- /* A Secret with an S3 identity, made only if its keys are given. Arguments: root, namespace, identity. */ -}}
{{- define "tributary.identitySecret" -}}
{{- if .identity.accessKeyId }}
---
apiVersion: v1
kind: Secret
metadata:
  name: {{ .identity.secretName }}
  namespace: {{ .namespace }}
  labels:
    {{- include "tributary.labels" .root | nindent 4 }}
type: Opaque
stringData:
  AWS_ACCESS_KEY_ID: {{ .identity.accessKeyId | quote }}
  AWS_SECRET_ACCESS_KEY: {{ .identity.secretAccessKey | quote }}
{{- end }}
{{- end }}
