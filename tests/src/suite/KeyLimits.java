import java.io.*;
import java.nio.file.*;
import java.security.cert.X509Certificate;
import javax.net.ssl.*;

/** Sends a file over TLS 1.3 and writes what comes back to another; the JDK renews its keys by jdk.tls.keyLimits. */
public class KeyLimits {
    public static void main(String[] args) throws Exception {
        TrustManager all = new X509ExtendedTrustManager() {
            public void checkClientTrusted(X509Certificate[] c, String a) {}
            public void checkServerTrusted(X509Certificate[] c, String a) {}
            public void checkClientTrusted(X509Certificate[] c, String a, java.net.Socket s) {}
            public void checkServerTrusted(X509Certificate[] c, String a, java.net.Socket s) {}
            public void checkClientTrusted(X509Certificate[] c, String a, SSLEngine e) {}
            public void checkServerTrusted(X509Certificate[] c, String a, SSLEngine e) {}
            public X509Certificate[] getAcceptedIssuers() { return new X509Certificate[0]; }
        };
        SSLContext context = SSLContext.getInstance("TLSv1.3");
        context.init(null, new TrustManager[] { all }, null);
        byte[] upload = Files.readAllBytes(Path.of(args[1]));
        SSLSocket socket = (SSLSocket) context.getSocketFactory().createSocket("127.0.0.1", Integer.parseInt(args[0]));
        socket.setEnabledProtocols(new String[] { "TLSv1.3" });
        socket.setEnabledCipherSuites(new String[] { args[3] });
        socket.setSoTimeout(60_000);
        Thread sender = new Thread(() -> {
            try {
                OutputStream out = socket.getOutputStream();
                for (int at = 0; at < upload.length; at += 8192) {
                    out.write(upload, at, Math.min(8192, upload.length - at));
                }
                out.flush();
            } catch (IOException e) {
                System.err.println("sender: " + e);
            }
        });
        sender.start();
        try (OutputStream file = new BufferedOutputStream(new FileOutputStream(args[2]))) {
            // A known length, as by Content-Length: a JDK that meets close_notify between its limit and our answer to
            // its KeyUpdate breaks the connection by itself (SSLSocketImpl.tryKeyUpdate).
            file.write(socket.getInputStream().readNBytes(Integer.parseInt(args[4])));
        }
        sender.join();
        socket.close();
    }
}
