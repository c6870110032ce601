{{/* Name of all namespaced objects; short enough for a label and for the names that Kubernetes derives from it. */}}
{{- define "finetune-operator.fullname" -}}
{{- $name := contains .Chart.Name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name .Chart.Name) -}}
{{- .Values.fullnameOverride | default $name | trunc 52 | trimSuffix "-" -}}
{{- end -}}

{{/* Name of cluster-scoped objects: two releases of one name may live in two namespaces. */}}
{{- define "finetune-operator.clusterName" -}}
{{- printf "%s-%s" .Release.Namespace (include "finetune-operator.fullname" .) -}}
{{- end -}}

{{- define "finetune-operator.selectorLabels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "finetune-operator.labels" -}}
{{ include "finetune-operator.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "finetune-operator.serviceAccountName" -}}
{{- $default := .Values.serviceAccount.create | ternary (include "finetune-operator.fullname" .) "default" -}}
{{- .Values.serviceAccount.name | default $default -}}
{{- end -}}

{{/* Reference of an image, from (list $ image). */}}
{{- define "finetune-operator.image" -}}
{{- $root := index . 0 -}}
{{- $image := index . 1 -}}
{{- with $root.Values.registry }}{{ trimSuffix "/" . }}/{{ end -}}
{{- $image.repository -}}
{{- if $image.digest }}@{{ $image.digest }}{{ else }}:{{ $image.tag | default $root.Chart.AppVersion }}{{ end -}}
{{- end -}}

{{/* Names of a list of {name: ...}, separated by commas. */}}
{{- define "finetune-operator.names" -}}
{{- $names := list -}}
{{- range . }}{{ $names = append $names .name }}{{ end -}}
{{- join "," $names -}}
{{- end -}}

{{/* What the operator has to know to write the jobs' NetworkPolicies, as JSON; empty without them. */}}
{{- define "finetune-operator.networkPolicy" -}}
{{- with .Values.networkPolicies -}}
{{- if .enabled -}}
{{- $labels := include "finetune-operator.selectorLabels" $ | fromYaml -}}
{{- dict "operatorNamespace" $.Release.Namespace "operatorLabels" $labels "ingress" .ingress "egress" .egress | toJson -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* What the operator may do with the objects of the namespaces it watches; no Secrets, no exec, no nodes. Jobs are deleted by
runPolicy.ttlSecondsAfterFinished alone. */}}
{{- define "finetune-operator.rules" -}}
- apiGroups: [finetune.dev]
  resources: [finetunejobs]
  verbs: [get, list, watch, delete]
- apiGroups: [finetune.dev]
  resources: [finetunejobs/status]
  verbs: [patch]
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, patch, delete]
{{- /* Before Kubernetes 1.36 a suspended Job's template can be changed only when its start time is removed. */}}
- apiGroups: [batch]
  resources: [jobs/status]
  verbs: [patch]
- apiGroups: [""]
  resources: [configmaps]
  verbs: [get, create, patch]
- apiGroups: [""]
  resources: [services]
  verbs: [get, create]
{{- if .Values.networkPolicies.enabled }}
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [get, create]
{{- end }}
- apiGroups: [""]
  resources: [pods]
  verbs: [list, watch, delete]
{{- /* Of pods whose node is gone: nobody else would say that they have ended. */}}
- apiGroups: [""]
  resources: [pods/status]
  verbs: [patch]
- apiGroups: [""]
  resources: [events]
  verbs: [list, create, patch]
{{- end -}}
