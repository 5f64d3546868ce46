{{- define "edge.name" -}}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{- end }}
{{- define "edge.tag" -}}{{ .Values.image.tag | default .Chart.AppVersion }}{{- end }}
{{- define "edge.selector" -}}
app.kubernetes.io/name: fedtide-edge
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}
{{- define "edge.labels" -}}
{{ include "edge.selector" . }}
app.kubernetes.io/part-of: fedtide
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version | replace "+" "_" }}
fedtide.dev/region: {{ .Values.region | quote }}
{{- end }}
{{- define "edge.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile: {type: RuntimeDefault}
{{- with .Values.pods.securityContext }}{{ toYaml . | nindent 0 }}{{ end }}
{{- end }}
{{- /* Where a pod runs, and what is added to it: the component's own values (`own`) go before those of all pods. */ -}}
{{- define "edge.placement" -}}
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
{{- define "edge.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}
{{- define "edge.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}
{{- define "edge.version" -}}{{ with .digest }}@{{ . }}{{ else }}:{{ include "edge.tag" .root }}{{ end }}{{- end }}
{{- define "edge.agentImage" -}}{{ .Values.image.registry }}/fedtide-agent{{ ternary "-train" "" .Values.agent.train }}{{ include "edge.version" (dict "root" . "digest" (ternary .Values.image.digests.agentTrain .Values.image.digests.agent .Values.agent.train)) }}{{- end }}
{{- define "edge.natsUrl" -}}tls://{{ include "edge.name" . }}-leaf.{{ .Release.Namespace }}.svc:4222{{- end }}
{{- define "edge.priority" -}}{{ .Release.Namespace }}-{{ include "edge.name" . }}-agent-{{ mul -1 (int .Values.agent.priority) }}{{- end }}
{{- define "edge.check" -}}
{{- if not .Values.region }}{{ fail "region is empty: set it to one of the cloud chart's regions" }}{{ end }}
{{- if not .Values.hub.url }}{{ fail "hub.url is empty: set it to where the hub takes leaves, e.g. tls://hub.example.com:7422" }}{{ end }}
{{- if not (and .Values.hub.accounts.region .Values.hub.accounts.system) }}{{ fail "hub.accounts is empty: copy hub.accounts.region and .system from what `fedtide fleet region` printed" }}{{ end }}
{{- $old := lookup "apps/v1" "StatefulSet" .Release.Namespace (printf "%s-leaf" (include "edge.name" .)) }}
{{- if $old }}{{ $there := (index $old.spec.volumeClaimTemplates 0).spec.resources.requests.storage }}{{ if ne $there .Values.leaf.storage.size }}{{ fail (printf "leaf.storage.size is %s where %s is installed: a StatefulSet's volumes cannot be changed in place. First: fedtide k8s grow %s --part edge --namespace %s --name %s" .Values.leaf.storage.size $there .Values.leaf.storage.size .Release.Namespace .Release.Name) }}{{ end }}{{ end }}
{{- end }}
