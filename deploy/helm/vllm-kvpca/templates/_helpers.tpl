{{- define "kvpca.name" -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- end }}

{{- define "kvpca.selector" -}}
app.kubernetes.io/name: vllm-kvpca
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "kvpca.labels" -}}
{{ include "kvpca.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "kvpca.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- /* Arguments of vllm serve, one per line. */ -}}
{{- define "kvpca.args" -}}
- {{ .Values.model | quote }}
- "--port=8000"
- {{ printf "--tensor-parallel-size=%d" (mul (int .Values.tensorParallelSize) (add 1 (int .Values.ray.workers))) | quote }}
{{- if .Values.servedModelName }}
- {{ printf "--served-model-name=%s" .Values.servedModelName | quote }}
{{- end }}
{{- if .Values.kvCompression.preset }}
- {{ printf "--kv-compression-preset=%s" .Values.kvCompression.preset | quote }}
- {{ printf "--kv-compress-after=%d" (int .Values.kvCompression.compressAfter) | quote }}
- {{ printf "--kv-keep-recent=%d" (int .Values.kvCompression.keepRecent) | quote }}
{{- end }}
{{- if .Values.ray.workers }}
- "--distributed-executor-backend=ray"
{{- end }}
{{- range .Values.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end }}

{{- define "kvpca.env" -}}
- name: VLLM_PLUGINS
  value: kvpca
{{- if .Values.apiKeySecret }}
- name: VLLM_API_KEY
  valueFrom:
    secretKeyRef:
      name: {{ .Values.apiKeySecret }}
      key: api-key
{{- end }}
{{- if .Values.huggingFaceTokenSecret }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ .Values.huggingFaceTokenSecret }}
      key: token
{{- end }}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "kvpca.resources" -}}
{{- $resources := deepCopy .Values.resources }}
{{- if .Values.gpuResource }}
{{- $limits := merge (dict .Values.gpuResource (int .Values.tensorParallelSize)) ($resources.limits | default dict) }}
{{- $_ := set $resources "limits" $limits }}
{{- end }}
{{- toYaml $resources }}
{{- end }}

{{- define "kvpca.volumes" -}}
- name: shared-memory
  emptyDir:
    medium: Memory
    sizeLimit: {{ .Values.sharedMemory }}
- name: huggingface
{{- if .Values.huggingFaceCache.enabled }}
  persistentVolumeClaim:
    claimName: {{ .Values.huggingFaceCache.existingClaim | default (printf "%s-huggingface" (include "kvpca.name" .)) }}
{{- else }}
  emptyDir: {}
{{- end }}
{{- end }}

{{- define "kvpca.mounts" -}}
- name: shared-memory
  mountPath: /dev/shm
- name: huggingface
  mountPath: /root/.cache/huggingface
{{- end }}

{{- define "kvpca.placement" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
