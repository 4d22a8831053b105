{{- /*
Rules that every pod of ours keeps, as ValidatingAdmissionPolicy variables and validations over an object with a pod
template. A field that is not mentioned here and could help an attacker is refused by its group: volumes and
environment are lists of what is allowed, never of what is not.
*/ -}}

{{- define "tributary.podVariables" -}}
- name: pod
  expression: object.spec.template.spec
- name: container
  expression: variables.pod.containers[0]
- name: env
  expression: "has(variables.container.env) ? variables.container.env : []"
- name: volumes
  expression: "has(variables.pod.volumes) ? variables.pod.volumes : []"
- name: mounts
  expression: "has(variables.container.volumeMounts) ? variables.container.volumeMounts : []"
{{- end }}

{{- /* Arguments: image (a CEL expression of the allowed ones' list), env (allowed names), account. */ -}}
{{- define "tributary.podRules" -}}
- expression: >-
    size(variables.pod.containers) == 1
    && (!has(variables.pod.initContainers) || size(variables.pod.initContainers) == 0)
    && (!has(variables.pod.ephemeralContainers) || size(variables.pod.ephemeralContainers) == 0)
  reason: Forbidden
  message: exactly one container is allowed, and no init or ephemeral containers
- expression: >-
    (!has(variables.container.command) || size(variables.container.command) == 0)
    && !has(variables.container.workingDir)
  reason: Forbidden
  message: the image's own entry point must run, in its own directory (no command, no workingDir)
- expression: variables.pod.serviceAccountName == {{ .account | squote }}
  reason: Forbidden
  message: the service account must be {{ .account }}
- expression: >-
    (!has(variables.container.envFrom) || size(variables.container.envFrom) == 0)
    && variables.env.all(e, e.name in {{ toJson .env | replace "\"" "'" }})
  reason: Forbidden
  messageExpression: >-
    'environment variables are limited to {{ join ", " .env }} (no envFrom); not allowed: '
    + variables.env.filter(e, !(e.name in {{ toJson .env | replace "\"" "'" }})).map(e, e.name).join(', ')
  message: environment variables are limited to {{ join ", " .env }}, and envFrom is not allowed
{{- /* The access key's name travels in clear: it must never be filled with another secret. */}}
- expression: >-
    variables.env.all(e, e.name.endsWith('AWS_ACCESS_KEY_ID') || e.name.endsWith('AWS_SECRET_ACCESS_KEY')
      ? has(e.valueFrom) && has(e.valueFrom.secretKeyRef)
        && e.valueFrom.secretKeyRef.key == e.name.replace('DATA_', '')
      : !has(e.valueFrom))
  reason: Forbidden
  message: S3 keys come from the entry of their own name in a Secret, and no other variable comes from one
{{- /* Kubernetes puts a variable's value for $(NAME): a Secret's entry would become part of the task. */}}
- expression: "variables.env.all(e, !e.?value.orValue('').contains('$('))"
  reason: Forbidden
  message: "no variable may refer to another one: $( is not allowed in a value"
- expression: >-
    variables.volumes.all(v, has(v.emptyDir) || has(v.secret) || has(v.persistentVolumeClaim))
  reason: Forbidden
  message: volumes are limited to emptyDir, secret and persistentVolumeClaim
{{- /* Each kind of volume has its own place: a claim at the noise key's would be a key that the hub knows. */}}
- expression: >-
    variables.mounts.all(m, !has(m.subPath) && !has(m.subPathExpr)
      && variables.volumes.exists(v, v.name == m.name && m.mountPath in (
        has(v.emptyDir) ? ['/tmp', '/dev/shm']
        : has(v.secret) ? ['/var/run/tributary/noise-key']
        : has(v.persistentVolumeClaim) ? ['/var/run/tributary/data'] : [])))
    && (!has(variables.container.volumeDevices) || size(variables.container.volumeDevices) == 0)
  reason: Forbidden
  message: >-
    volumes are mounted whole and each in its place: emptyDir at /tmp or /dev/shm, the noise key at
    /var/run/tributary/noise-key, the data's claim at /var/run/tributary/data; never over the image's code
- expression: >-
    variables.container.?terminationMessagePath.orValue('/dev/termination-log') == '/dev/termination-log'
    && variables.container.?terminationMessagePolicy.orValue('File') == 'File'
  reason: Forbidden
  message: the termination message is the file /dev/termination-log, and never the log
- expression: >-
    (!has(variables.pod.hostNetwork) || !variables.pod.hostNetwork)
    && (!has(variables.pod.hostPID) || !variables.pod.hostPID)
    && (!has(variables.pod.hostIPC) || !variables.pod.hostIPC)
    && (!has(variables.pod.shareProcessNamespace) || !variables.pod.shareProcessNamespace)
    && (!has(variables.container.ports) || variables.container.ports.all(p, !has(p.hostPort) || p.hostPort == 0))
  reason: Forbidden
  message: the node's network, processes and ports are out of reach
- expression: >-
    has(variables.pod.securityContext)
    && has(variables.pod.securityContext.runAsNonRoot) && variables.pod.securityContext.runAsNonRoot
    && has(variables.pod.securityContext.seccompProfile)
    && variables.pod.securityContext.seccompProfile.type == 'RuntimeDefault'
    && (!has(variables.pod.securityContext.runAsUser) || variables.pod.securityContext.runAsUser > 0)
    && (!has(variables.pod.securityContext.sysctls) || size(variables.pod.securityContext.sysctls) == 0)
  reason: Forbidden
  message: the pod's security context must be restricted (runAsNonRoot, seccomp RuntimeDefault)
- expression: >-
    has(variables.container.securityContext)
    && has(variables.container.securityContext.allowPrivilegeEscalation)
    && !variables.container.securityContext.allowPrivilegeEscalation
    && (!has(variables.container.securityContext.privileged) || !variables.container.securityContext.privileged)
    && has(variables.container.securityContext.readOnlyRootFilesystem)
    && variables.container.securityContext.readOnlyRootFilesystem
    && (!has(variables.container.securityContext.runAsUser) || variables.container.securityContext.runAsUser > 0)
    && (!has(variables.container.securityContext.runAsNonRoot) || variables.container.securityContext.runAsNonRoot)
    && !has(variables.container.securityContext.seccompProfile) && !has(variables.container.securityContext.procMount)
    && has(variables.container.securityContext.capabilities)
    && has(variables.container.securityContext.capabilities.drop)
    && 'ALL' in variables.container.securityContext.capabilities.drop
    && (!has(variables.container.securityContext.capabilities.add)
      || size(variables.container.securityContext.capabilities.add) == 0)
  reason: Forbidden
  message: the container's security context must be restricted (no privileges, no capabilities, read-only root)
- expression: >-
    !has(variables.pod.hostAliases) && !has(variables.pod.dnsConfig) && !has(variables.pod.nodeName)
    && !has(variables.pod.runtimeClassName) && !has(variables.pod.priorityClassName)
    && (!has(variables.pod.resourceClaims) || size(variables.pod.resourceClaims) == 0)
  reason: Forbidden
  message: hostAliases, dnsConfig, nodeName, runtimeClassName, priorityClassName and resourceClaims are not the operator's to set
{{- end }}
