{{- define "tributary.healthPort" -}}8080{{- end }}

{{- /* Service account of the pods in hub namespaces. It may do nothing. */ -}}
{{- define "tributary.hubServiceAccount" -}}tributary-job{{- end }}

{{- /* The operator's settings, all of them. A test compares these names with tributary_operator.settings as sets. */ -}}
{{- define "tributary.operatorEnv" -}}
- {name: TRIBUTARY_WORKER_IMAGE, value: {{ .Values.workerImage | quote }}}
- {name: TRIBUTARY_BUCKET, value: {{ .Values.store.bucket | quote }}}
- {name: TRIBUTARY_NAMESPACE, value: {{ .Release.Namespace | quote }}}
- name: POD_NAME
  valueFrom:
    fieldRef: {fieldPath: metadata.name}
- name: POD_UID
  valueFrom:
    fieldRef: {fieldPath: metadata.uid}
- {name: TRIBUTARY_IDENTITY, value: "$(POD_NAME)_$(POD_UID)"}
- {name: TRIBUTARY_STORE_ENDPOINT, value: {{ .Values.store.operatorEndpoint | default .Values.store.endpoint | quote }}}
- {name: TRIBUTARY_STORE_ENDPOINT_FOR_PODS, value: {{ .Values.store.endpoint | quote }}}
- {name: TRIBUTARY_STORE_REGION, value: {{ .Values.store.region | quote }}}
- {name: TRIBUTARY_AGGREGATOR_SECRET, value: {{ .Values.store.credentials.aggregator.secretName | quote }}}
- {name: TRIBUTARY_SERVING_SECRET, value: {{ .Values.store.credentials.serving.secretName | quote }}}
- {name: TRIBUTARY_HUB_SERVICE_ACCOUNT, value: {{ include "tributary.hubServiceAccount" . | quote }}}
- {name: TRIBUTARY_HUB_JOB_RESOURCES, value: {{ toJson .Values.hubJobs.resources | quote }}}
- {name: TRIBUTARY_HUB_JOB_DEADLINE_SECONDS, value: {{ .Values.hubJobs.deadlineSeconds | quote }}}
- {name: TRIBUTARY_HUB_JOB_BACKOFF_LIMIT, value: {{ .Values.hubJobs.backoffLimit | quote }}}
- {name: TRIBUTARY_ACCOUNTANT_PROCESSES, value: {{ .Values.tuning.accountantProcesses | quote }}}
- {name: TRIBUTARY_STORE_THREADS, value: {{ .Values.tuning.storeThreads | quote }}}
- {name: TRIBUTARY_REQUEST_TIMEOUT_SECONDS, value: {{ .Values.tuning.requestTimeoutSeconds | quote }}}
- {name: TRIBUTARY_WATCH_TIMEOUT_SECONDS, value: {{ .Values.tuning.watchTimeoutSeconds | quote }}}
- {name: TRIBUTARY_POLL_SECONDS, value: {{ .Values.tuning.pollSeconds | quote }}}
- {name: TRIBUTARY_RESYNC_SECONDS, value: {{ .Values.tuning.resyncSeconds | quote }}}
- {name: TRIBUTARY_CLEANUP_TIMEOUT_SECONDS, value: {{ .Values.tuning.cleanupTimeoutSeconds | quote }}}
- {name: TRIBUTARY_LEASE_DURATION_SECONDS, value: {{ .Values.tuning.leaseDurationSeconds | quote }}}
- {name: TRIBUTARY_LEASE_RENEW_SECONDS, value: {{ .Values.tuning.leaseRenewSeconds | quote }}}
- {name: TRIBUTARY_LEASE_RETRY_SECONDS, value: {{ .Values.tuning.leaseRetrySeconds | quote }}}
- {name: TRIBUTARY_STUCK_AFTER_SECONDS, value: {{ .Values.tuning.stuckAfterSeconds | quote }}}
- {name: TRIBUTARY_HEALTH_PORT, value: {{ include "tributary.healthPort" . | quote }}}
- {name: TRIBUTARY_LOG_LEVEL, value: {{ .Values.logLevel | quote }}}
- name: TRIBUTARY_SIGNING_KEY
  valueFrom:
    secretKeyRef: {name: {{ .Values.signingKey.secretName }}, key: key}
{{- range $name := list "AWS_ACCESS_KEY_ID" "AWS_SECRET_ACCESS_KEY" }}
- name: {{ $name }}
  valueFrom:
    secretKeyRef: {name: {{ $.Values.store.credentials.operator.secretName }}, key: {{ $name }}}
{{- end }}
{{- end }}
