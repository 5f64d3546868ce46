{{- define "fedtide.name" -}}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{- end }}
{{- define "fedtide.tag" -}}{{ .Values.image.tag | default .Chart.AppVersion }}{{- end }}
{{- define "fedtide.version" -}}{{ with .digest }}@{{ . }}{{ else }}:{{ include "fedtide.tag" .root }}{{ end }}{{- end }}
{{- define "fedtide.image" -}}{{ .Values.image.registry }}/fedtide-coordinator{{ include "fedtide.version" (dict "root" . "digest" .Values.image.digests.coordinator) }}{{- end }}
{{- define "fedtide.aggregatorImage" -}}{{ .Values.aggregator.image | default (printf "%s/fedtide-aggregator%s" .Values.image.registry (include "fedtide.version" (dict "root" . "digest" .Values.image.digests.aggregator))) }}{{- end }}
{{- define "fedtide.selector" -}}
app.kubernetes.io/name: fedtide
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}
{{- define "fedtide.labels" -}}
{{ include "fedtide.selector" . }}
app.kubernetes.io/part-of: fedtide
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version | replace "+" "_" }}
{{- end }}
{{- define "fedtide.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile: {type: RuntimeDefault}
{{- with .Values.pods.securityContext }}{{ toYaml . | nindent 0 }}{{ end }}
{{- end }}
{{- /* Where a pod runs, and what is added to it: the component's own values (`own`) go before those of all pods. */ -}}
{{- define "fedtide.placement" -}}
{{- $own := .own | default dict }}{{- $all := .root.Values.pods }}
{{- with merge (deepCopy ($own.nodeSelector | default dict)) $all.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with concat ($own.tolerations | default list) $all.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $own.affinity | default $all.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $all.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end }}
{{- define "fedtide.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}
{{- define "fedtide.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}
{{- define "fedtide.natsUrl" -}}
{{- if .Values.nats.enabled }}tls://{{ include "fedtide.name" . }}-nats.{{ .Release.Namespace }}.svc:4222{{ else }}{{ .Values.nats.externalUrl }}{{ end }}
{{- end }}
{{- define "fedtide.hosts" -}}
{{- $name := include "fedtide.name" . -}}
{{- $hosts := list (printf "%s-coordinator.%s.svc" $name .Release.Namespace) (printf "%s-coordinator" $name) (printf "%s-nats.%s.svc" $name .Release.Namespace) (printf "%s-nats" $name) (printf "*.%s-nats-pods.%s.svc" $name .Release.Namespace) (printf "%s-leaf.%s.svc" $name .Release.Namespace) "localhost" "127.0.0.1" -}}
{{- concat $hosts .Values.nats.leaf.hosts (ternary (list .Values.ingress.host) (list) (and .Values.ingress.enabled (ne .Values.ingress.host ""))) | join "," -}}
{{- end }}
{{- define "fedtide.tlsSecret" -}}
{{ include "fedtide.name" . }}{{ ternary "-certificate" "-servers" .Values.tls.certManager.enabled }}
{{- end }}
{{- /* What a person has to know before anything is installed. */ -}}
{{- define "fedtide.check" -}}
{{- if gt (len .Release.Name) 40 }}{{ fail (printf "the release name %q has more than 40 characters: choose a shorter one" .Release.Name) }}{{ end }}
{{- with .Values.regionalAggregators.keda }}{{ if and .enabled (not (and .endpoint .account)) }}{{ fail "regionalAggregators.keda.enabled is true: set its endpoint (HOST:8222 of the hub's monitoring) and account (hub.accounts.hub, from fedtide fleet region)" }}{{ end }}{{ end }}
{{- $old := lookup "apps/v1" "StatefulSet" .Release.Namespace (printf "%s-nats" (include "fedtide.name" .)) }}
{{- if and $old .Values.nats.enabled (ne (int $old.spec.replicas) (int .Values.nats.replicas)) }}{{ fail (printf "nats.replicas is %d where %d are installed: a hub cannot change from one server to three in place. Install a second release and move" (int .Values.nats.replicas) (int $old.spec.replicas)) }}{{ end }}
{{- if and $old .Values.nats.enabled }}{{ $there := (index $old.spec.volumeClaimTemplates 0).spec.resources.requests.storage }}{{ if ne $there .Values.nats.storage.size }}{{ fail (printf "nats.storage.size is %s where %s is installed: a StatefulSet's volumes cannot be changed in place. First: fedtide k8s grow %s --namespace %s --name %s" .Values.nats.storage.size $there .Values.nats.storage.size .Release.Namespace .Release.Name) }}{{ end }}{{ end }}
{{- if and (not .Values.nats.enabled) (not .Values.nats.externalUrl) }}{{ fail "nats.enabled is false: set nats.externalUrl to the hub's address, e.g. tls://nats.example.com:4222" }}{{ end }}
{{- $served := lookup "rbac.authorization.k8s.io/v1" "Role" .Release.Namespace "fedtide-operator" }}
{{- if and $served .Values.operator.enabled }}{{ $by := get (default dict $served.metadata.annotations) "meta.helm.sh/release-name" }}{{ if and $by (ne $by .Release.Name) }}{{ fail (printf "the operator of release %s serves the custom resources of namespace %s: set operator.enabled=false, or install into a namespace of its own" $by .Release.Namespace) }}{{ end }}{{ end }}
{{- if not .Values.regions }}{{ fail "regions is empty: name the regions that will join, e.g. --set regions='{eu-west,us-east}'" }}{{ end }}
{{- if and .Values.ingress.enabled (not .Values.ingress.host) }}{{ fail "ingress.enabled is true: set ingress.host to the name under which the API is reached" }}{{ end }}
{{- if and .Values.networkPolicy.enabled (or .Values.ingress.enabled .Values.serviceMonitor.enabled) (not .Values.networkPolicy.ingressFrom) }}{{ fail "ingress or serviceMonitor is enabled, and network policies let nobody outside this namespace in: set networkPolicy.ingressFrom to the ingress controller's or Prometheus' namespace, e.g. [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: ingress-nginx}}}]" }}{{ end }}
{{- if and .Values.regionalAggregators.enabled (not (and .Values.regionalAggregators.region .Values.regionalAggregators.credentialsSecret .Values.regionalAggregators.leafUrl)) }}{{ fail "regionalAggregators.enabled is true: set its region, leafUrl and credentialsSecret (fedtide fleet region REGION --out DIR writes regional.creds)" }}{{ end }}
{{- if and .Values.rotation.schedule (not .Values.identity.create) }}{{ fail "rotation.schedule is set and identity.create is false: whoever makes the Secrets rotates them" }}{{ end }}
{{- if and .Values.backup.enabled (not .Values.backup.to) }}{{ fail "backup.enabled is true: set backup.to, e.g. s3://BUCKET/FOLDER/" }}{{ end }}
{{- if and .Values.tls.certManager.enabled (not .Values.tls.certManager.issuerRef) }}{{ fail "tls.certManager.enabled is true: set tls.certManager.issuerRef, e.g. {name: ca, kind: ClusterIssuer}" }}{{ end }}
{{- end }}
{{- /* NATS counts in MB and GB; something of the volume is left for the accounts and for compaction. */ -}}
{{- define "fedtide.maxFile" -}}
{{- $size := .Values.nats.storage.size -}}
{{- if hasSuffix "Gi" $size }}{{ mul (trimSuffix "Gi" $size | int) 900 }}MB{{ else if hasSuffix "Ti" $size }}{{ mul (trimSuffix "Ti" $size | int) 900 }}GB{{ else }}{{ fail (printf "nats.storage.size %q: give it in Gi or Ti" $size) }}{{ end }}
{{- end }}
{{- define "fedtide.monitorHost" -}}{{ if or .Values.networkPolicy.monitorFrom (and .Values.regionalAggregators.enabled .Values.regionalAggregators.keda.enabled) }}0.0.0.0{{ else }}127.0.0.1{{ end }}{{- end }}
{{- define "fedtide.coordinatorMounts" }}
- {name: config, mountPath: /etc/fedtide/config, readOnly: true}
- {name: identity, mountPath: /etc/fedtide/identity, readOnly: true}
- {name: tls, mountPath: /etc/fedtide/tls, readOnly: true}
- {name: tmp, mountPath: /tmp}
{{- end }}
{{- define "fedtide.coordinatorVolumes" -}}
{{- $name := include "fedtide.name" . -}}
- name: config
  configMap: {name: {{ $name }}-coordinator}
- name: identity
  secret:
    secretName: {{ $name }}-identity
    defaultMode: 0440
    optional: true # of these files, some are only there while keys are replaced
    items:
      - {key: trust-roots.json, path: trust-roots.json}
      - {key: trust-targets.json, path: trust-targets.json}
      {{- range (list "director" "timestamp") }}
      - {key: {{ . }}.pem, path: {{ . }}.pem}
      - {key: {{ . }}-2.pem, path: {{ . }}-2.pem}
      - {key: {{ . }}-3.pem, path: {{ . }}-3.pem}
      {{- end }}
      - {key: authority.json, path: authority.json}
      - {key: coordinator.creds, path: coordinator.creds}
      - {key: system.creds, path: system.creds}
      - {key: api-token, path: api-token}
      - {key: ca.crt, path: ca.crt}
      - {key: ca.key, path: ca.key}
- name: tls
  secret:
    secretName: {{ include "fedtide.tlsSecret" . | trim }}
    defaultMode: 0440
    items:
      - {key: ca.crt, path: ca.crt}
      - {key: tls.crt, path: tls.crt}
      - {key: tls.key, path: tls.key}
{{- end }}
{{- define "fedtide.storeSecret" -}}
{{- with .Values.backup.secret }}
envFrom: [{secretRef: {name: {{ . }}}}]
{{- end }}
{{- end }}
