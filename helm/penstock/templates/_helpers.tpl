{{- define "penstock.fullname" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "penstock.selectorLabels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "penstock.labels" -}}
{{ include "penstock.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- end -}}

{{- /* The port inside the container. Nothing outside depends on it: the Service targets it by name. */ -}}
{{- define "penstock.port" -}}8080{{- end -}}

{{- /* The Secret that holds the hashed keys; empty when there are none. */ -}}
{{- define "penstock.keysSecret" -}}
{{- if .Values.auth.existingSecret -}}
{{- .Values.auth.existingSecret -}}
{{- else if .Values.auth.keys -}}
{{- printf "%s-keys" (include "penstock.fullname" . | trunc 58 | trimSuffix "-") -}}
{{- end -}}
{{- end -}}

{{- define "penstock.auditFolder" -}}/var/lib/penstock/audit{{- end -}}

{{- /* Penstock's settings file. Everything that needs a setting's final value reads it from here, so that `config` counts. */ -}}
{{- define "penstock.settings" -}}
{{- $auth := dict "allow_anonymous" .Values.auth.allowAnonymous -}}
{{- if include "penstock.keysSecret" . -}}
{{- $_ := set $auth "keys_file" "/etc/penstock/auth/keys.txt" -}}
{{- end -}}
{{- range $name := list "plans" "jwt" -}}
{{- with get $.Values.auth $name -}}
{{- $_ := set $auth $name . -}}
{{- end -}}
{{- end -}}
{{- $listen := dict "host" "0.0.0.0" "port" (include "penstock.port" . | int) -}}
{{- if .Values.tls.existingSecret -}}
{{- $tls := dict "cert_file" "/etc/penstock/tls/tls.crt" "key_file" "/etc/penstock/tls/tls.key" -}}
{{- if .Values.tls.clientCertificates -}}
{{- $_ := set $tls "client_ca_file" "/etc/penstock/tls/ca.crt" -}}
{{- end -}}
{{- $_ := set $listen "tls" $tls -}}
{{- end -}}
{{- with .Values.cors.origins -}}
{{- $_ := set $listen "cors" (dict "origins" .) -}}
{{- end -}}
{{- $audit := pick .Values.audit "otlp" "text" "sample" -}}
{{- if .Values.audit.volume -}}
{{- $file := pick .Values.audit "rotate_bytes" "keep" "days" -}}
{{- $_ := set $audit "file" (merge (dict "path" (printf "%s/audit.jsonl" (include "penstock.auditFolder" .))) $file) -}}
{{- end -}}
{{- $settings := dict "audit" $audit "listen" $listen "upstreams" (concat (list .Values.upstream) .Values.moreUpstreams) "auth" $auth -}}
{{- $settings = merge $settings (pick .Values "reasoning" "families" "moderation" "limits" "slow_client" "timing" "routing" "passthrough" "answers" "answer_cache") -}}
{{- $_ := set $settings "store" (omit .Values.store "existingSecret" "existingSecretKey") -}}
{{- mergeOverwrite (deepCopy $settings) (deepCopy .Values.config) | toYaml -}}
{{- end -}}

{{- /* Seconds between the pod's deletion and SIGKILL: never less than the drain needs. */ -}}
{{- define "penstock.gracePeriod" -}}
{{- $timing := (include "penstock.settings" . | fromYaml).timing -}}
{{- $drain := addf $timing.drain_seconds $timing.closing_seconds | ceil | int -}}
{{- add (int .Values.shutdown.preStopSeconds) $drain (int .Values.shutdown.marginSeconds) -}}
{{- end -}}

{{- /* What a schema can refuse only with an unhelpful message. */ -}}
{{- define "penstock.refuse" -}}
{{- if and .Values.auth.keys .Values.auth.existingSecret -}}
{{- fail "auth.keys and auth.existingSecret are both set. Keep one: the chart mounts a single keys file." -}}
{{- end -}}
{{- if and .Values.tls.clientCertificates (not .Values.tls.existingSecret) -}}
{{- fail "tls.clientCertificates needs tls.existingSecret, a Secret with tls.crt, tls.key and ca.crt." -}}
{{- end -}}
{{- if not (or .Values.auth.allowAnonymous .Values.auth.jwt .Values.tls.clientCertificates (include "penstock.keysSecret" .)) -}}
{{- fail "auth: no API keys, so everybody who reaches the Service could use the engine. Make a key with 'penstock hash-key' and pass --set auth.keys.NAME=sha256:HEX; or name a Secret that holds such lines, --set auth.existingSecret=SECRET; or accept open access, --set auth.allowAnonymous=true." -}}
{{- end -}}
{{- range $owned := list "listen" "auth" -}}
{{- if hasKey $.Values.config $owned -}}
{{- fail (printf "config.%s: the chart sets it itself, since the Service, the probes and the mounted Secret depend on it. Use the values %s instead." $owned (get (dict "listen" "service.port, tls and cors" "auth" "auth.*") $owned)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
