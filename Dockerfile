# The image holds the one file and a small Python. Mount the configuration at /etc/chatgpt-apiserver, or pass OPENAI_API_KEY.
FROM python:3.13-alpine
RUN adduser -D -H -u 10001 apiserver && mkdir /var/lib/chatgpt-apiserver && chown apiserver /var/lib/chatgpt-apiserver
COPY chatgpt_apiserver.py /app/chatgpt_apiserver.py
# Compile the file once, so that every start is faster and needs less memory.
RUN python3 -m py_compile /app/chatgpt_apiserver.py
WORKDIR /etc/chatgpt-apiserver
USER apiserver
ENV CHATGPT_APISERVER_HOST=0.0.0.0 CHATGPT_APISERVER_PORT=8080 PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=/app
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=5s CMD ["python3", "-m", "chatgpt_apiserver", "--healthcheck"]
ENTRYPOINT ["python3", "-m", "chatgpt_apiserver"]
